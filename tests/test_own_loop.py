"""DeepSpeed engines as a loop of one's own may have them: what is followed. test_own_loop_refusals.py has what is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from inrun_megatron.errors import UserError
from tests.distributed import Workers
from tests.own_loop import (
    LENGTH,
    ROWS,
    Loss,
    Tiny,
    make_batch,
    make_engine,
    make_pipeline,
    scored_steps,
    token_losses,
)


def _resume(rank: int, world: int, stage: int, directory: str) -> list[tuple[Any, ...]]:
    torch.manual_seed(0)
    first = Tiny()
    engine = make_engine(first, torch.optim.AdamW(first.parameters()), {"stage": stage}, clip=0.1)
    engine.save_checkpoint(directory, tag="start")
    second = Tiny()
    engine = make_engine(second, torch.optim.AdamW(second.parameters()), {"stage": stage}, clip=0.01)
    engine.load_checkpoint(directory, tag="start")
    return [
        (r.gradient_norm, r.clip_coefficient, r.additivity_lhs, r.additivity_rhs)
        for r in scored_steps(engine)
    ]


@pytest.mark.parametrize(("stage", "clip"), [(0, 0.01), (2, 0.1), (3, 0.01)])
def test_the_clip_coefficient_is_the_optimizers(
    two_ranks: Workers, tmp_path: Path, stage: int, clip: float
) -> None:
    """DeepSpeed's optimizers of stages 1 and 2 go on with the threshold of the checkpoint that they loaded."""
    for norm, coefficient, values, optimizer in two_ranks.run(_resume, stage, str(tmp_path))[0]:
        assert coefficient == pytest.approx(clip / norm, rel=1e-4)
        assert values == pytest.approx(optimizer, rel=1e-3)


def _frozen_group(rank: int, world: int, stage: int) -> list[tuple[Any, ...]]:
    torch.manual_seed(0)
    model = Tiny()
    frozen = [p for p in model.parameters() if p.ndim == 1]
    for parameter in frozen:
        parameter.requires_grad_(False)
    groups = [
        {"params": frozen, "weight_decay": 0.0},
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
    ]
    results = scored_steps(make_engine(model, torch.optim.AdamW(groups, lr=1e-2), {"stage": stage}))
    return [(r.values, r.additivity_lhs, r.additivity_rhs) for r in results]


def test_a_parameter_group_may_be_frozen_as_a_whole(two_ranks: Workers) -> None:
    """At stages 1 and 2 DeepSpeed itself takes no such group."""
    whole, sharded = (two_ranks.run(_frozen_group, stage)[0] for stage in (0, 3))
    for (values, left, right), (others, *_) in zip(whole, sharded, strict=True):
        assert left == pytest.approx(right, rel=1e-3)
        torch.testing.assert_close(values, others, rtol=1e-3, atol=1e-6)


def _diverging(rank: int, world: int) -> list[tuple[str, float]]:
    torch.manual_seed(0)
    model = Tiny()
    engine = make_engine(model, torch.optim.AdamW(model.parameters()), {"stage": 0})
    return [(r.status, r.clip_coefficient) for r in scored_steps(engine, factor=1e22)]


def test_a_norm_that_is_not_finite_leaves_a_step_without_values(two_ranks: Workers) -> None:
    """In fp32 at stage 0 DeepSpeed clips such a gradient, whose squares overflow, to zero."""
    first, second = two_ranks.run(_diverging)[0]
    assert first == ("skipped: values are not finite", 0.0)
    assert second[0] == "scored"


class _Noisy(Tiny):
    """It draws random numbers in evaluation mode, too."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.dropout(super().forward(tokens), 0.1, training=True)


def _draws(rank: int, world: int) -> list[bool]:
    from inrun_megatron import InRunShapley, ShapleyTarget

    model, same = _Noisy(), []
    engine = make_engine(model, torch.optim.AdamW(model.parameters()), {"stage": 1})
    target = ShapleyTarget("held_out", [make_batch(50 + rank)], world * ROWS * LENGTH)
    shapley, micro = InRunShapley(engine, [target], token_losses), make_batch(rank)
    for iteration in (1, 2):
        before = torch.get_rng_state()
        with (
            shapley.step(iteration) as step,
            step.samples(torch.zeros(ROWS), torch.arange(ROWS), micro["loss_mask"]),
        ):
            same.append(torch.equal(torch.get_rng_state(), before))
            engine.backward(token_losses(engine, micro).mean())
            engine.step()
    shapley.close()
    return same


def test_a_model_that_draws_in_evaluation_mode_trains_as_without_scoring(two_ranks: Workers) -> None:
    for same in two_ranks.run(_draws):
        assert same == [True, True]


def _added_up(rank: int, world: int, stage: int, estimator: str) -> list[torch.Tensor]:
    """Values where the ranks' gradients are averaged, and where those of ``1 / world`` times the loss are added up."""
    values = []
    for operation, factor in (("mean", 1.0), ("sum", 1.0 / world)):
        torch.manual_seed(0)
        model = Tiny()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        settings = {"gradient_allreduce_op": operation}
        engine = make_engine(model, optimizer, {"stage": stage}, clip=0.0, settings=settings)

        def loss(losses: torch.Tensor, micro: Any, factor: float = factor) -> torch.Tensor:
            return losses.mean() * factor

        values.append(scored_steps(engine, 1, factor, estimator=estimator, training_loss=loss)[0].values)
    return values


@pytest.mark.parametrize(("stage", "estimator"), [(0, "first_order"), (2, "midpoint")])
def test_gradients_may_be_added_up_over_ranks(two_ranks: Workers, stage: int, estimator: str) -> None:
    for averaged, added in two_ranks.run(_added_up, stage, estimator):
        torch.testing.assert_close(added, averaged, rtol=1e-5, atol=1e-9)


def _one_stage(rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
    """First values through a pipeline of one stage, and without a pipeline."""
    import copy

    from inrun_megatron import InRunShapley, PipelineShapley, ShapleyTarget

    engine, model = make_pipeline(1)
    model = copy.deepcopy(model)
    micro = make_batch(10 + rank) | {"dataset": torch.zeros(ROWS), "sample": torch.arange(ROWS)}
    target = ShapleyTarget("held_out", [make_batch(50 + rank)], num_tokens=world * ROWS * LENGTH)
    shapley = PipelineShapley(engine, [target], Loss(), base="current")
    with shapley.step(1) as step:
        step.train_batch([micro])
    through = step.result.values
    engine = make_engine(model, torch.optim.AdamW(model.parameters()), {"stage": 0})
    with InRunShapley(engine, [target], token_losses, base="current").step(1) as plain:
        with plain.samples(micro["dataset"], micro["sample"], micro["loss_mask"]):
            engine.backward(token_losses(engine, micro).mean())
            engine.step()
    without = plain.result.values
    assert through is not None and without is not None
    return through, without


def test_a_pipeline_of_one_stage_has_the_values_of_none(two_ranks: Workers) -> None:
    """Its ranks are replicas: the norms of the targets' gradients are summed over them once."""
    for through, without in two_ranks.run(_one_stage):
        torch.testing.assert_close(through, without, rtol=1e-4, atol=1e-9)


def _credited(rank: int, world: int, betas: tuple[float, float], credit: str) -> list[float | None] | str:
    """Credit factors of two steps of a model whose vectors have ``betas``; or the refusal."""
    torch.manual_seed(0)
    model = Tiny()
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.dim() > 1]},
        {"params": [p for p in model.parameters() if p.dim() == 1], "betas": betas},
    ]
    engine = make_engine(model, torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99)), {"stage": 1})
    try:
        return [result.credit_factor for result in scored_steps(engine, credit=credit, total_steps=2)]
    except UserError as error:
        return str(error)


def test_a_step_has_one_credit_factor_or_none(two_ranks: Workers) -> None:
    """Moments that decay at different rates carry parts of one gradient for differently many steps."""
    for same in two_ranks.run(_credited, (0.9, 0.999), "trajectory"):
        assert same == pytest.approx([1 + 0.9 * 0.1 / 0.19, 1.0])
    for unlike in two_ranks.run(_credited, (0.5, 0.99), "step"):
        assert unlike == [None, 1.0]
    for refusal in two_ranks.run(_credited, (0.5, 0.99), "trajectory"):
        assert refusal.startswith("the optimizer's momentum carries gradients of its parameter groups")


def _as_the_loss_scale_grows(
    rank: int, world: int, stage: int, estimator: str, clip: float
) -> tuple[Any, Any]:
    """A step in which the loss scale doubles, and one at a fixed scale whose loss is half as large."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    results = []
    for dynamic, factor in ((True, 1.0), (False, 0.5)):
        torch.manual_seed(0)
        model = Tiny()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
        scale = {"initial_scale_power": 8, "loss_scale_window": 1, "hysteresis": 1, "loss_scale": 256}
        settings = {"fp16": {"enabled": True, **scale, **({"loss_scale": 0} if dynamic else {})}}
        engine = make_engine(model, optimizer, {"stage": stage}, clip=clip, settings=settings)
        if dynamic:
            engine.optimizer.loss_scaler.last_overflow_iter = -2  # so that a window ends with the first step

        def loss(losses: torch.Tensor, micro: Any, factor: float = factor) -> torch.Tensor:
            return losses.mean() * factor

        results.append(scored_steps(engine, 1, factor, estimator=estimator, training_loss=loss)[0])
        assert engine.optimizer.loss_scale == (512.0 if dynamic else 256.0)
    return results[0], results[1]


@pytest.mark.parametrize(
    ("stage", "estimator", "clip"),
    [(1, "first_order", 0.0), (2, "midpoint", 0.75), (3, "midpoint", 0.0), (3, "first_order", 0.3)],
)
def test_a_loss_scale_that_grows_halves_its_step(
    two_ranks: Workers, stage: int, estimator: str, clip: float
) -> None:
    """DeepSpeed unscales gradients by the scale of the next step."""
    for grown, half in two_ranks.run(_as_the_loss_scale_grows, stage, estimator, clip):
        torch.testing.assert_close(
            grown.values, half.values, rtol=2e-3, atol=float(half.values.abs().max()) * 2e-3
        )
        assert grown.additivity_lhs == pytest.approx(grown.additivity_rhs, rel=2e-2)
        assert grown.gradient_norm == pytest.approx(half.gradient_norm, rel=2e-3)
        assert grown.clip_coefficient == pytest.approx(half.clip_coefficient, rel=2e-3)
