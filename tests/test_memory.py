"""ZeRO-3: what a rank keeps alive shrinks with the data-parallel size."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import pytest
import torch

from tests.distributed import assert_cases, run_cases
from tests.layout_engine import build_engine
from tests.layouts import LayoutCase


@dataclass(frozen=True)
class Bytes:
    weights: int  # live bytes of parameters' storages, largest over the step
    directions: int  # bytes that directions hold between uses
    transient: int  # largest direction of one layer, gathered for a moment
    model: int  # bytes of the whole model in fp32


def _measure(rank: int, world: int, case: LayoutCase) -> Bytes:
    """Live parameter storage after every emission of a scored step, and what the directions hold."""
    from inrun_megatron import InRunShapley, Layout, ShapleyTarget
    from inrun_megatron.models import token_losses
    from tests.layout_engine import forward_backward, share

    engine = build_engine(case)
    layout = Layout.current()
    parameters = list(engine.module.parameters())
    seen = {"weights": 0}

    def live() -> None:
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parameters}
        seen["weights"] = max(seen["weights"], sum(storages.values()))

    targets = [
        ShapleyTarget(t.name, share(t, layout, 2, pipeline=False), t.num_tokens) for t in case.targets()
    ]
    shapley = InRunShapley(engine, targets, token_losses, layout=layout, consumers=[lambda emission: live()])
    for iteration, batch in enumerate(case.batches(), start=1):
        with shapley.step(iteration) as step:
            for microbatch in batch[layout.dp_rank]:
                with step.samples(
                    microbatch["dataset"], microbatch["sample"], microbatch["loss_mask"].sum(1)
                ):
                    forward_backward(engine, microbatch)
    gc.collect()
    sizes = [getattr(p, "ds_numel", p.numel()) * 4 for p in parameters]
    # Anything that still holds a gathered weight would show as a large fp32 tensor that is no shard.
    shapes = {
        tuple(getattr(p, "ds_shape", p.shape)) for p in parameters if p.ndim > 1 or hasattr(p, "ds_shape")
    }
    if case.zero == 3:
        whole = [
            t
            for t in gc.get_objects()
            if isinstance(t, torch.Tensor) and t.ndim > 1 and tuple(t.shape) in shapes
        ]
        assert not whole, (
            f"tensors of whole weights' shapes are alive after the step: {[t.shape for t in whole]}"
        )
    return Bytes(seen["weights"], shapley.directions.nbytes, max(sizes) * len(targets), sum(sizes))


def _case(world: int, zero: int) -> LayoutCase:
    return LayoutCase(world, 1, False, zero, 1, "llama", "adamw", micro_batch=2, steps=2)


@pytest.mark.slow
def test_weights_and_directions_shrink_with_data_parallel_size() -> None:
    measured: dict[tuple[int, int], Bytes] = {}
    for world in (1, 2, 4):
        cases = [_case(world, 3), _case(world, 2)]
        for case, ranks in zip(cases, assert_cases(run_cases(_measure, world, cases)), strict=True):
            measured[case.zero, world] = max(ranks, key=lambda b: b.weights)
            print(f"ZeRO-{case.zero}, data parallel {world}: {measured[case.zero, world]}")
    model = measured[3, 1].model
    targets = 2
    for world in (2, 4):
        found = measured[3, world]
        # Directions: K fp32 vectors over dp, up to the padding of each parameter's partition.
        assert found.directions <= 1.05 * targets * model / world
        # Weights: a layer at a time is gathered, never the model.
        assert found.weights < 0.6 * model
    # The control: under ZeRO-2 everything is whole on every rank, and these bounds would not hold.
    assert measured[2, 4].directions >= targets * model
    assert measured[2, 4].weights >= model
