"""`inrun plan` against what real scored steps hold, send and compute."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from inrun_megatron.defaults import BUCKET_SIZE
from inrun_megatron.ledger import LedgerWriter, RunDescription, create_ledger
from inrun_megatron.model_config import ModelConfig
from inrun_megatron.plan import predict
from inrun_megatron.plan.job import Job, count
from inrun_megatron.plan.presets import PRESETS
from tests.counting import standing_in
from tests.distributed import assert_cases, run_cases
from tests.layout_engine import build_engine
from tests.layouts import LayoutCase

MICRO_BATCH, SEQUENCES, TARGETS = 2, 5, 2
# Modules that issue scoring's own collectives; the model's are in the taps.
COLLECTIVE_MODULES = (
    "directions.vectors",
    "directions.reductions",
    "directions.gathers",
    "engines.buckets",
    "shapley.scored_step",
    "engines.evaluating",
    "taps.experts",
)


@dataclass(frozen=True)
class Case:
    layout: LayoutCase
    estimator: str = "first_order"
    base: str = "current"
    direction_dtype: str = "fp32"
    bucket_size: int = BUCKET_SIZE
    operations: bool = True  # experts: how many rows each is given depends on the routing

    def job(self) -> Job:
        """The plan's description of the run that `_measure` makes."""
        case = self.layout
        return Job(
            model=case.config(),
            vocab_size=-(-61 // case.tp) * case.tp,
            seq_length=12,
            world_size=case.world,
            global_batch_size=case.dp * case.accumulation * case.micro_batch,
            micro_batch_size=case.micro_batch,
            tensor_parallel=case.tp,
            sequence_parallel=case.sp,
            zero_stage=case.zero,
            parameter_bytes=4,
            adam=case.optimizer in ("adam", "adamw"),
            targets=TARGETS,
            target_sequences=SEQUENCES,
            target_micro_batch_size=MICRO_BATCH,
            estimator=self.estimator,
            base=self.base,
            direction_dtype=self.direction_dtype,
        )


@dataclass(frozen=True)
class Measured:
    parameters: int
    directions: int
    batch_gradient: int
    saved_weights: int
    calls: Counter[str]
    bytes: Counter[str]
    plain: float
    scored: float
    validation_saved: int
    training_saved: int


class Recorder:
    """Stands where a module has `torch.distributed`: every collective runs, and is counted with its bytes."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        original = getattr(torch.distributed, name)
        kinds = {
            "all_reduce": "all_reduce",
            "reduce_scatter_tensor": "reduce_scatter",
            "all_gather_into_tensor": "all_gather",
            "all_to_all_single": "all_to_all",
        }
        kind = kinds.get(name, "")
        if not kind:
            return original

        def counted(*tensors: Any, **options: Any) -> Any:
            self.calls[kind] += 1
            self.bytes[kind] += max(t.numel() * t.element_size() for t in tensors if torch.is_tensor(t))
            return original(*tensors, **options)

        return counted


def _operations(run: Callable[[], None]) -> float:
    """Operations of linear layers, attention and dots, by torch's counter."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    aten = torch.ops.aten

    def heads(q: Any, kv: Any) -> Any:  # of grouped queries, which torch counts itself from 2.11 on
        return (*q[:2], *kv[2:])

    mapping: dict[Any, Any] = {
        aten.addmm_: lambda out, a, b, *_, out_shape=None, **__: 2 * a[0] * a[1] * b[1],
        aten.dot: lambda a, b, *_, out_shape=None, **__: 2 * a[0],
        # The CPU's flash attention, which the counter does not know.
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, out_shape=None, **__: (
            sdpa_flop_count(q, heads(q, k), heads(q, v))
        ),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, out_shape=None, **__: (
            sdpa_backward_flop_count(g, q, heads(q, k), heads(q, v))
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        run()
    return float(counter.get_total_flops())


def _saved(run: Callable[[], Any]) -> int:
    """Bytes of the storages that autograd saves during `run`, each once, all kept until its end."""
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in storages.values())


def _measure(rank: int, world: int, case: Case) -> Measured:
    from inrun_megatron import InRunShapley, Layout, ShapleyTarget
    from inrun_megatron.engines import buckets
    from inrun_megatron.models import token_losses
    from inrun_megatron.shapley.passes import Task
    from tests.layout_engine import forward_backward, share

    buckets.BUCKET_SIZE = case.bucket_size
    layout_case = case.layout
    engine = build_engine(layout_case)
    layout = Layout.current()
    rows = layout_case.targets()[0]
    assert len(rows.rows["tokens"]) == SEQUENCES
    own = share(rows, layout, MICRO_BATCH, pipeline=False)
    targets = [ShapleyTarget(f"target{k}", own, rows.num_tokens) for k in range(TARGETS)]
    shapley = InRunShapley(
        engine,
        targets,
        token_losses,
        layout=layout,
        estimator=case.estimator,
        base=case.base,
        direction_dtype=case.direction_dtype,
    )
    batches = [batch[layout.dp_rank] for batch in layout_case.batches()]

    def step(iteration: int, scored: bool) -> None:
        microbatches = batches[iteration - 1]
        if not scored:
            for microbatch in microbatches:
                forward_backward(engine, microbatch)
            return
        with shapley.step(iteration, microbatches) as owner:
            for microbatch in microbatches:
                tokens = microbatch["loss_mask"].sum(1)
                with owner.samples(microbatch["dataset"], microbatch["sample"], tokens):
                    forward_backward(engine, microbatch)
        assert owner.result.scored, owner.result.status

    step(1, True)  # moments and buffers exist from here on, and rows have been watched
    plain = _operations(lambda: step(2, False))
    recorder = Recorder()
    with standing_in(recorder, COLLECTIVE_MODULES):
        scored = _operations(lambda: step(3, True))
    validation = training = 0
    if world == 1 and not case.layout.zero:
        first = targets[0].microbatches[0]
        task = Task(first, lambda emission: None, lambda losses: losses.sum())
        validation = _saved(lambda: shapley.passes.run([task], training=False))
        training = _saved(lambda: token_losses(engine, batches[0][0]))
    batch, lookahead = shapley.preparation.batch, shapley.preparation._lookahead
    saved = lookahead._weights_to_keep()
    return Measured(
        parameters=sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters()),
        directions=shapley.directions.nbytes,
        batch_gradient=0 if batch is None else batch.nbytes,
        saved_weights=sum(piece.numel() * piece.element_size() for piece in saved),
        calls=recorder.calls,
        bytes=recorder.bytes,
        plain=plain,
        scored=scored,
        validation_saved=validation,
        training_saved=training,
    )


def _case(
    world: int,
    zero: int,
    shape: str = "gpt2",
    tp: int = 1,
    *,
    qk_layernorm: bool = False,
    experts: int | None = None,
    **options: Any,
) -> Case:
    layout = LayoutCase(world, tp, tp > 1, zero, 2, shape, "adamw", micro_batch=MICRO_BATCH, steps=3)  # type: ignore[arg-type]
    layout = replace(layout, qk_layernorm=qk_layernorm, experts=experts, shared_expert=experts is not None)
    return Case(layout, **options)


CASES = {
    1: [
        _case(1, 0),
        _case(1, 0, "llama"),
        _case(1, 1, estimator="midpoint"),
        _case(1, 1, "llama", base="drift", direction_dtype="bf16"),
        _case(1, 1, estimator="simpson"),
    ],
    2: [
        _case(2, 0),
        _case(2, 1, "llama", direction_dtype="bf16"),
        _case(2, 2, estimator="simpson"),
        _case(2, 1, base="drift"),
        _case(2, 2, bucket_size=3000, direction_dtype="bf16"),
        _case(2, 0, bucket_size=3000),
        _case(2, 3),
        _case(2, 3, "llama", estimator="midpoint", direction_dtype="bf16"),
        _case(2, 1, tp=2, qk_layernorm=True),
        _case(2, 1, "llama", tp=2, estimator="midpoint"),
        _case(2, 2, "llama", tp=2, experts=4),
        _case(2, 3, "llama", experts=4, operations=False),
    ],
}
TOLERANCE = 0.01


@pytest.mark.parametrize("world", CASES)
def test_predictions_are_what_real_steps_hold_send_and_compute(
    world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes to the padding of partitions, collectives one by one, operations to what norms and biases add."""
    cases = CASES[world]
    for case, ranks in zip(cases, assert_cases(run_cases(_measure, world, cases)), strict=True):
        job = case.job()
        monkeypatch.setattr(predict, "BUCKET_SIZE", case.bucket_size)
        found: Measured = ranks[0]  # tensor-parallel rank 0 counts replicated parameters
        name = f"{case.layout.shape}, ZeRO-{job.zero_stage}, TP {job.tensor_parallel}, {case.estimator} {case.base}"
        memory, work = predict.memory(job), predict.operations(job)
        expected = predict.collectives(job)
        print(f"\n{name}: directions {found.directions:,} B (plan {memory.directions:,})", end="")
        print(f", calls {dict(found.calls)}, bytes {dict(found.bytes)}", end="")
        assert found.parameters == count(job.parameters), name
        assert found.directions == pytest.approx(memory.directions, rel=TOLERANCE), name
        assert found.batch_gradient == pytest.approx(memory.batch_gradient, rel=TOLERANCE), name
        if job.cost.moves:
            assert found.saved_weights == pytest.approx(memory.saved_weights, rel=TOLERANCE), name
        calls: Counter[str] = Counter()
        sizes: Counter[str] = Counter()
        for own in expected:
            calls[own.kind] += own.count
            sizes[own.kind] += own.bytes
        assert found.calls == calls, name
        for kind, size in sizes.items():
            assert found.bytes[kind] == pytest.approx(size, rel=TOLERANCE), f"{name}: {kind}"
        if job.tensor_parallel == 1 and case.operations:
            plain = sum(rank.plain for rank in ranks)
            extra = sum(rank.scored for rank in ranks) - plain
            print(f", operations +{extra / plain:.1%} (plan +{work.extra / work.training:.1%})", end="")
            assert plain == pytest.approx(work.training, rel=TOLERANCE), name
            assert extra == pytest.approx(work.extra, rel=TOLERANCE), name
        if found.training_saved:
            # A validation microbatch of the training size keeps no more for backward: no extra activations.
            assert 0 < found.validation_saved <= found.training_saved, name


def test_other_targets_change_the_prediction() -> None:
    """The control: another number of targets would be found out by the tolerances above."""
    job = _case(2, 1).job()
    other = replace(job, targets=TARGETS + 1)
    assert predict.memory(other).directions > (1 + TOLERANCE) * predict.memory(job).directions
    assert predict.operations(other).extra > (1 + TOLERANCE) * predict.operations(job).extra
    assert sum(own.count for own in predict.collectives(other)) > sum(
        own.count for own in predict.collectives(job)
    )


@pytest.mark.parametrize("targets", [1, 2, 4, 16])
def test_ledger_bytes(tmp_path: Path, targets: int) -> None:
    """Rows of the real writer: random values, samples in the order of a blend of three."""
    generator, batch, steps = np.random.default_rng(0), 256, 60
    described = RunDescription(
        targets=[{"name": f"target{k}"} for k in range(targets)],
        datasets=[{"name": name, "index": index} for index, name in enumerate("abc")],
    )
    with create_ledger(tmp_path / "ledger", described):
        writer = LedgerWriter(tmp_path / "ledger", 0)
        next_sample = np.zeros(3, np.int64)
        for step in range(1, steps + 1):
            dataset = generator.integers(0, 3, batch)
            sample = np.empty(batch, np.int64)
            for position, index in enumerate(dataset):
                sample[position] = next_sample[index]
                next_sample[index] += 1
            values = generator.normal(0.0, 1e-4, (batch, targets))
            writer.append(step, dataset, sample, np.full(batch, 4096), values)
        parts = writer.write_parts()
    job = replace(_case(1, 1).job(), targets=targets, train_iters=steps, global_batch_size=batch)
    rows, size = predict.ledger(job)
    assert sum(part.rows for part in parts) == rows
    assert sum(part.bytes for part in parts) == pytest.approx(size, rel=0.15)


@pytest.mark.parametrize(
    ("preset", "parameters", "gpus"),
    [("7b", 6.738e9, 64), ("70b", 68.98e9, 1024), ("405b", 405.9e9, 16384), ("8x7b", 46.70e9, 256)],
)
def test_presets_are_the_published_models(preset: str, parameters: float, gpus: int) -> None:
    model, job = PRESETS[preset]
    layout = {"world_size": 1, "tensor_parallel": 1, "pipeline_parallel": 1, "sequence_parallel": False}
    whole = Job(model=ModelConfig(**model), **job | layout)
    assert count(whole.parameters) == pytest.approx(parameters, rel=1e-3) and job["world_size"] == gpus
