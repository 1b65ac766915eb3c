"""One scored training run under one parallel layout, on real DeepSpeed engines: what the oracle is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from tests.oracle import (
    GlobalBatch,
    OracleRun,
    OracleTarget,
    OracleTrainer,
    Parameters,
    random_rows,
    split_batch,
)
from tests.oracle_gpt import GPTShape, random_parameters, with_padded_vocab
from tests.oracle_optimizer import OptimizerSpec
from tests.oracle_shards import split_parameters

VOCABULARY, SEQUENCE, EOD = 61, 12, 0
TARGET_SEQUENCES = (5, 3)  # two targets, of several sequences each; microbatches of 2 divide neither


Trainer = TypeVar("Trainer", bound=OracleTrainer)


def with_documents(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows cut at random by end-of-document tokens; `documents` [b, s] by the package's own rule.

    Among them a document of one token, one that ends with its row, and rows of a single document.
    """
    from inrun_megatron.data.megatron import document_ids

    tokens = rows["tokens"].clone()
    generator = torch.Generator().manual_seed(int(tokens.sum()))
    tokens[tokens == EOD] = EOD + 1
    tokens[torch.rand(tokens.shape, generator=generator) < 0.2] = EOD
    tokens[0, [0, -1]] = EOD
    tokens[-1, :-2] = EOD + 2
    labels = torch.cat((tokens[:, 1:], rows["labels"][:, -1:]), dim=1)
    return {**rows, "tokens": tokens, "labels": labels, "documents": document_ids(tokens, EOD)}


def positions_in(documents: Tensor) -> Tensor:
    """Positions that start at 0 with each document, [b, s]."""
    return torch.tensor(
        [[t - row[: t + 1].index(row[t]) for t in range(len(row))] for row in documents.tolist()]
    )


@dataclass(frozen=True)
class LayoutCase:
    """A layout on `world` ranks; data parallel is what is left of the world."""

    world: int
    tp: int
    sp: bool
    zero: int
    accumulation: int
    shape: Literal["gpt2", "llama"]
    optimizer: Literal["sgd", "momentum", "adamw", "adam"] = "adamw"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    micro_batch: int = 2
    recompute: bool = False
    steps: int = 5
    scoring: bool = True
    proxy: bool = False
    grad_accum_fp32: bool = False
    dropout: float = 0.0  # the oracle has none
    pp: int = 1
    layers: int = 2
    tied: bool | None = None  # None: gpt2 is, llama is not
    estimator: str = "first_order"
    base: str = "current"
    credit: str = "step"
    granularity: Literal["sample", "document", "token"] = "sample"
    reset_attention: bool = False  # attention and positions start anew with each document
    scale_power: int = 10  # fp16's first loss scale, as a power of 2
    refresh: int = 1
    direction_dtype: str = "fp32"
    lr_growth: float = 1.0  # of the learning rate from step to step

    @property
    def dp(self) -> int:
        return self.world // (self.tp * self.pp)

    def model(self) -> GPTShape:
        groups = None if self.shape == "gpt2" else max(2, self.tp)
        # Padded to a multiple of 4 whatever the layout, so that all layouts of a shape share their weights.
        return GPTShape(
            self.shape, self.layers, 32, 4, VOCABULARY, SEQUENCE, num_query_groups=groups, tied=self.tied
        )

    def spec(self) -> OptimizerSpec:
        clip = 0.5
        return {
            "sgd": OptimizerSpec("sgd", clip=clip, weight_decay=0.01),
            "momentum": OptimizerSpec("sgd", momentum=0.9, nesterov=True, clip=clip),
            "adam": OptimizerSpec("adam", clip=clip, weight_decay=0.05),
            "adamw": OptimizerSpec("adamw", clip=clip, weight_decay=0.1),
        }[self.optimizer]

    @property
    def lr(self) -> float:
        return 0.05 if self.optimizer in ("sgd", "momentum") else 2e-3

    def batches(self) -> list[GlobalBatch]:
        rows = self.dp * self.accumulation * self.micro_batch
        shape = self.model()
        return [
            split_batch(
                self._cut(random_rows(shape, rows, seed=100 + t, first_sample=t * rows)),
                self.dp,
                self.accumulation,
                self.micro_batch,
            )
            for t in range(self.steps)
        ]

    def targets(self) -> list[OracleTarget]:
        shape = self.model()
        return [
            OracleTarget(f"target{k}", self._cut(random_rows(shape, n, seed=k)))
            for k, n in enumerate(TARGET_SEQUENCES)
        ]

    def _cut(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """The rows with documents of their own lengths, where the case has to do with documents or parts."""
        if self.granularity == "sample" and not self.reset_attention:
            return rows
        rows = with_documents(rows)
        documents = rows.pop("documents")
        if self.reset_attention:
            rows |= {"documents": documents, "position_ids": positions_in(documents)}
        if self.granularity == "token":
            rows["segments"] = torch.arange(SEQUENCE).expand_as(documents)
        elif self.granularity == "document":
            rows["segments"] = documents
        return rows

    def parameters(self) -> Parameters:
        """Full initial weights: DeepSpeed's fp32 masters are copies of the model's rounded weights."""
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]
        return {n: p.to(dtype).double() for n, p in random_parameters(self.model(), seed=7).items()}

    def trainer(self, kind: type[Trainer]) -> Trainer:
        return kind(
            self.model(),
            self.parameters(),
            self.spec(),
            lambda t: self.lr * self.lr_growth ** (t - 1),
            self.targets(),
            proxy=self.proxy,
            estimator=self.estimator,
            base=self.base,
            refresh=self.refresh,
        )

    def oracle(self) -> OracleRun:
        return self.trainer(OracleTrainer).run(self.batches())


@dataclass(frozen=True)
class Ran:
    """What one rank saw."""

    place: tuple[int, int, int]  # (tp rank, dp rank, pp rank)
    values: list[Tensor | None]  # per step [rows of this replica, K]
    samples: list[Tensor]  # per step [rows of this replica]
    target_losses: list[list[float] | None]
    clip: list[float | None]
    drift: list[list[float] | None]
    additivity: list[tuple[list[float], list[float]] | None]
    weights: Parameters
    counters: tuple[int, int, int]  # global steps, micro steps, skipped steps
    rng: Tensor
    statuses: list[str]
    losses: list[float]  # the pipeline engine's training losses
    parts: list[dict[tuple[int, int], Tensor]]  # per step {(sample, ordinal): values [K]}
    ages: list[int | None]  # of the directions, per step


def _optimizer(case: LayoutCase, model: torch.nn.Module) -> torch.optim.Optimizer:
    spec = case.spec()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": spec.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    if spec.kind == "sgd":
        return torch.optim.SGD(groups, lr=case.lr, momentum=spec.momentum, nesterov=spec.nesterov)
    kind = torch.optim.AdamW if spec.kind == "adamw" else torch.optim.Adam
    return kind(groups, lr=case.lr, betas=(spec.beta1, spec.beta2), eps=spec.eps)


def _configuration(case: LayoutCase) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": case.micro_batch,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": case.spec().clip,
        # Stage 3 lets go of a layer as soon as it is done: its defaults would keep a model this small gathered.
        "zero_optimization": {
            "stage": case.zero,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 0,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if case.precision == "bf16":
        config["bf16"] = {"enabled": True}
    if case.precision == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": case.scale_power}
    if case.grad_accum_fp32:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if case.pp > 1 and case.sp:
        from inrun_megatron.engines.pipeline import unpartitioned

        config = unpartitioned(config)
    return config


def build_engine(case: LayoutCase) -> Any:
    """The engine of this rank, its weights those of the oracle."""
    import deepspeed
    from megatron.core import parallel_state

    from inrun_megatron.config import ModelConfig
    from inrun_megatron.engines.gradients import sum_sequence_parallel_gradients, watch_fp32_clipping
    from inrun_megatron.models import build_gpt, cpu
    from inrun_megatron.models.pipeline import build_pipeline
    from inrun_megatron.training.distributed import Mpu

    if case.precision == "fp16":
        # DeepSpeed refuses fp16 on CPUs without native fp16; torch computes in it all the same.
        from deepspeed.accelerator import get_accelerator

        get_accelerator().is_fp16_supported = lambda: True
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    parallel_state.initialize_model_parallel(case.tp, case.pp)
    cpu.install()
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    cpu.seed_everything(1, tp_rank=tp_rank, dp_rank=parallel_state.get_data_parallel_rank())
    shape = case.model()
    llama = {
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "swiglu": True,
        "disable_bias_linear": True,
        "group_query_attention": True,
        "num_query_groups": shape.groups,
    }
    sizes = {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn,
        "num_attention_heads": shape.num_attention_heads,
        "make_vocab_size_divisible_by": 1,
        "untie_embeddings_and_output_weights": not shape.is_tied,
        "hidden_dropout": case.dropout,
        "attention_dropout": case.dropout,
    }
    model = (build_gpt if case.pp == 1 else build_pipeline)(
        ModelConfig(**sizes, **(llama if case.shape == "llama" else {})),
        vocab_size=VOCABULARY,
        seq_length=SEQUENCE,
        seed=1,
        sequence_parallel=case.sp,
    )
    padded = -(-VOCABULARY // case.tp) * case.tp
    full = with_padded_vocab(case.parameters(), VOCABULARY, padded)
    shard = split_parameters(full, shape, case.tp, tp_rank)
    named = named_parameters(model)
    if case.pp == 1:
        assert named.keys() == shard.keys(), set(named) ^ set(shard)
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(shard[name])
    engine = deepspeed.initialize(
        model=model,
        optimizer=_optimizer(case, model),
        config=_configuration(case),
        mpu=Mpu() if case.pp == 1 else None,
    )[0]
    watch_fp32_clipping(engine, lambda norm: None)
    if case.sp:
        sum_sequence_parallel_gradients(engine.module, parallel_state.get_tensor_model_parallel_group())
    if case.zero == 3 and shape.is_tied:
        deepspeed.zero.register_external_parameter(
            engine.module.output_layer, engine.module.embedding.word_embeddings.weight
        )
    return engine


def named_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Parameters by GPTModel's names, also those of a pipeline stage."""
    own = dict(model.named_parameters())
    return {model.gpt_name(n): p for n, p in own.items()} if hasattr(model, "gpt_name") else own


def _share(target: OracleTarget, layout: Any, size: int, *, pipeline: bool) -> list[dict[str, Tensor]]:
    """The microbatches that a run would give this rank (data/targets.py)."""
    from inrun_megatron.data.targets import Target

    rows = target.rows
    tokens = torch.cat([rows["tokens"], rows["labels"][:, -1:]], dim=1)
    documents = rows.get("documents")
    sequences = Target(target.name, tokens, rows["loss_mask"], rows["position_ids"], {}, documents=documents)
    return sequences.microbatches(size, layout.dp_rank, layout.dp_size, full_size=pipeline)


def train(rank: int, world: int, case: LayoutCase) -> Ran:
    """Run the case on this rank; a function for `run_cases`."""
    from deepspeed.utils import safe_get_full_fp32_param

    from inrun_megatron import InRunShapley, Layout, PipelineShapley, ShapleyTarget, attach_taps
    from inrun_megatron.engines.pipeline import train_batch
    from inrun_megatron.models import token_losses
    from inrun_megatron.models.recompute import enable_recompute

    engine = build_engine(case)
    layout = Layout.current()
    taps = attach_taps(engine.module)
    if case.recompute and case.pp > 1:
        engine.module.recompute(taps.capture)
    elif case.recompute:
        enable_recompute(engine.module.decoder, 1, wrap=taps.capture)
    size = case.micro_batch if case.pp > 1 else 2  # a pipeline has one shape for all its microbatches
    targets = [
        ShapleyTarget(t.name, _share(t, layout, size, pipeline=case.pp > 1), t.num_tokens)
        for t in case.targets()
    ]
    shapley: Any = None
    if case.scoring:
        kind, loss = (
            (InRunShapley, token_losses) if case.pp == 1 else (PipelineShapley, engine.module.loss_fn)
        )
        shapley = kind(
            engine,
            targets,
            loss,
            layout=layout,
            taps=taps,
            optimizer="sgd" if case.proxy else "auto",
            estimator=case.estimator,
            base=case.base,
            credit=case.credit,
            total_steps=case.steps,
            refresh=case.refresh,
            direction_dtype=case.direction_dtype,
        )
    results, samples, losses = [], [], []
    for iteration, batch in enumerate(case.batches(), start=1):
        own = batch[layout.dp_rank]
        for group in engine.optimizer.param_groups if case.lr_growth != 1.0 else ():
            group["lr"] = case.lr * case.lr_growth ** (iteration - 1)
        samples.append(torch.cat([m["sample"] for m in own]))
        if shapley is None:
            if case.pp > 1:
                losses.append(float(train_batch(engine, [engine.module.loss_fn.split(m) for m in own])))
            for microbatch in own if case.pp == 1 else ():
                _forward_backward(engine, microbatch)
            continue
        with shapley.step(iteration, own) as step:
            if case.pp > 1:
                losses.append(step.train_batch(own))
            for microbatch in own if case.pp == 1 else ():
                with step.samples(
                    microbatch["dataset"],
                    microbatch["sample"],
                    microbatch["loss_mask"],
                    microbatch.get("segments"),
                ):
                    _forward_backward(engine, microbatch)
        results.append(step.result)
    weights = {}
    for name, parameter in named_parameters(engine.module).items():
        full = safe_get_full_fp32_param(parameter) if case.zero > 0 else parameter.detach()
        weights[name] = full.detach().float().clone()
    return Ran(
        place=(layout.tp_rank, layout.dp_rank, layout.pp_rank),
        values=[r.values for r in results],
        samples=samples,
        target_losses=[r.target_losses for r in results],
        clip=[r.clip_coefficient for r in results],
        drift=[
            None
            if r.momentum_terms is None
            else [m + d for m, d in zip(r.momentum_terms, r.decay_terms, strict=True)]
            for r in results
        ],
        additivity=[
            None if r.additivity_lhs is None else (r.additivity_lhs, r.additivity_rhs) for r in results
        ],
        weights=weights,
        counters=(engine.global_steps, engine.micro_steps, engine.skipped_steps),
        rng=torch.get_rng_state(),
        statuses=[r.status for r in results],
        losses=losses,
        parts=[_parts(r, s) for r, s in zip(results, samples)],
        ages=[r.direction_age for r in results],
    )


def _parts(result: Any, samples: Tensor) -> dict[tuple[int, int], Tensor]:
    if result.parts is None:
        return {}
    rows, ordinals = result.places
    return {
        (int(samples[row]), int(ordinal)): values
        for row, ordinal, values in zip(rows, ordinals, result.parts, strict=True)
    }


def _forward_backward(engine: Any, microbatch: dict[str, Tensor]) -> None:
    from inrun_megatron.models import token_losses

    losses, mask = token_losses(engine, microbatch), microbatch["loss_mask"]
    engine.backward((losses * mask).sum() / mask.sum())
    engine.step()


def by_sample(ranks: list[Ran], step: int) -> dict[int, Tensor]:
    """Values [K] of every sample of a step; all ranks of a replica must agree."""
    found: dict[int, Tensor] = {}
    for ran in ranks:
        values = ran.values[step]
        assert values is not None, ran.statuses[step]
        for sample, value in zip(ran.samples[step].tolist(), values, strict=True):
            if sample in found:
                assert torch.equal(found[sample], value), f"ranks of a replica disagree about sample {sample}"
            found[sample] = value
    return found


def deviation(ranks: list[Ran], oracle: OracleRun, step: int) -> float:
    """Largest difference from the oracle's values over the largest value, all targets of one step."""
    truth = {sample: value for (_, sample), value in oracle.steps[step].by_sample().items()}
    found = by_sample(ranks, step)
    assert found.keys() == truth.keys()
    worst = torch.zeros(len(TARGET_SEQUENCES), dtype=torch.float64)
    largest = torch.zeros_like(worst)
    for sample, value in truth.items():
        worst = torch.maximum(worst, (found[sample] - value).abs())
        largest = torch.maximum(largest, value.abs())
    return float((worst / largest).max())
