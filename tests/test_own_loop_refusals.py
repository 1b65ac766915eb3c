"""What DeepSpeed engines of a loop of one's own may not have: refused in one line, by all ranks."""

from __future__ import annotations

import re
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from inrun_megatron.engines.zero import refuse_offload
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


@pytest.mark.parametrize(
    ("settings", "refusal"),
    [
        ({"device": "nvme", "nvme_path": "/disk"}, r"offload_optimizer\.device nvme"),
        ({"device": "cpu", "ratio": 0.5}, r"offload_optimizer\.ratio 0\.5"),
        ({"device": "cpu", "super_offload": True}, r"offload_optimizer\.super_offload true"),
        ({"device": "cpu"}, None),
        ({}, None),
    ],
)
def test_an_optimizer_in_two_places_is_refused(settings: dict[str, Any], refusal: str | None) -> None:
    """What stays on a GPU is stepped by an optimizer of its own there, whose moments would be taken for zero."""
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig

    config = DeepSpeedZeroOffloadOptimizerConfig(**settings)
    with nullcontext() if refusal is None else pytest.raises(UserError, match=refusal):
        refuse_offload(config)


def _share(rank: int, world: int, stage: int) -> str:
    model = Tiny()
    engine = make_engine(model, torch.optim.AdamW(model.parameters()), {"stage": stage})
    with pytest.raises(UserError) as refusal:
        scored_steps(engine, shares=(2, 1))
    return str(refusal.value)


def test_ranks_must_have_equally_many_validation_microbatches(two_ranks: Workers) -> None:
    for refusal in two_ranks.run(_share, 3):
        assert "target held_out has 1 microbatches on one rank and 2 on another" in refusal


def _own_tokens(rank: int, world: int) -> str:
    """num_tokens of this rank's sequences alone, and on rank 0 only."""
    from inrun_megatron import InRunShapley, ShapleyTarget

    model = Tiny()
    engine = make_engine(model, torch.optim.AdamW(model.parameters()), {"stage": 1})
    counts = ROWS * LENGTH * (1 if rank == 0 else world)
    with pytest.raises(UserError) as refusal:
        InRunShapley(engine, [ShapleyTarget("held_out", [make_batch(50 + rank)], counts)], token_losses)
    return str(refusal.value)


def test_a_wrong_number_of_tokens_is_refused(two_ranks: Workers) -> None:
    """All values of the target would be scaled, and the audits with them."""
    for refusal in two_ranks.run(_own_tokens):
        assert refusal.startswith(
            "target held_out has 30 loss tokens in its loss masks over all ranks, but num_tokens is"
        )
        assert refusal.endswith("give num_tokens=30")


class _Flipped(Tiny):
    """Its hidden layers see the rows in another order."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens).flip(0)
        return self.output(F.gelu(self.hidden(self.norm(x))).flip(0))


class _SequenceFirst(Tiny):
    """Its hidden layers see positions where the others see rows."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens).transpose(0, 1)
        return self.output(F.gelu(self.hidden(self.norm(x))).transpose(0, 1))


def _rows_elsewhere(rank: int, world: int, kind: type[Tiny]) -> str:
    """With as many positions as rows; rank 0 has validation microbatches of one row, which tell nothing."""
    from inrun_megatron import InRunShapley, ShapleyTarget

    model = kind()
    engine = make_engine(model, torch.optim.AdamW(model.parameters()), {"stage": 3})
    held_out = {name: tensor[: 1 if rank == 0 else None, :ROWS] for name, tensor in make_batch(50).items()}
    shapley = InRunShapley(engine, [ShapleyTarget("held_out", [held_out], ROWS * (ROWS + 1))], token_losses)
    with pytest.raises(UserError) as refusal, shapley.step(1):
        pass
    return str(refusal.value)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (_Flipped, "a layer on another rank does not have"),
        (_SequenceFirst, "layer hidden sees tokens of shape [3, 1] with rows along dimension 0"),
    ],
)
def test_rows_in_other_places_are_refused(two_ranks: Workers, kind: type[Tiny], said: str) -> None:
    """Their values would be other samples', and still add up to the gradient; all ranks stop."""
    other, own = two_ranks.run(_rows_elsewhere, kind)
    assert own.startswith("layer hidden does not have the microbatch's rows apart and in order")
    assert other.startswith(said)


def _rows_elsewhere_in_a_stage(rank: int, world: int, base: str) -> str:
    from megatron.core import parallel_state

    from inrun_megatron import PipelineShapley, ShapleyTarget

    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=world)
    try:
        engine, _ = make_pipeline(world, around_hidden=lambda x: x.flip(0))
        target = ShapleyTarget("held_out", [make_batch(50)], ROWS * LENGTH)
        shapley = PipelineShapley(engine, [target], Loss(), base=base)
        with pytest.raises(UserError) as refusal, shapley.step(1):
            pass
    finally:
        parallel_state.destroy_model_parallel()
    return str(refusal.value)


@pytest.mark.parametrize("base", ["current", "drift"])
def test_rows_in_other_places_are_refused_in_a_stage(two_ranks: Workers, base: str) -> None:
    """Whether validation rides in front of the training microbatches or has passes of its own."""
    own, other = two_ranks.run(_rows_elsewhere_in_a_stage, base)
    assert own.endswith("sequence_first=True))") and "does not have the microbatch's rows apart" in own
    assert other.startswith("a layer on another rank does not have")


def _split_sequences(rank: int, world: int) -> str:
    model = Tiny()
    engine = make_engine(model, torch.optim.AdamW(model.parameters()), {"stage": 0}, mesh_param=(1, 2))
    with pytest.raises(UserError) as refusal:
        scored_steps(engine)
    return str(refusal.value)


def test_deepspeeds_own_sequence_parallelism_is_refused(two_ranks: Workers) -> None:
    for refusal in two_ranks.run(_split_sequences):
        assert refusal.startswith("DeepSpeed's sequence parallel size 2")


def _context_parallel(rank: int, world: int) -> str:
    from megatron.core import parallel_state

    from inrun_megatron import Layout

    parallel_state.initialize_model_parallel(context_parallel_size=world)
    try:
        with pytest.raises(UserError) as refusal:
            Layout.current()
    finally:
        parallel_state.destroy_model_parallel()
    return str(refusal.value)


def test_context_parallelism_is_refused(two_ranks: Workers) -> None:
    for refusal in two_ranks.run(_context_parallel):
        assert refusal.startswith("context parallel size 2 is not supported")


def _predivided(rank: int, world: int) -> tuple[str, list[float]]:
    """The refusal, and the gradient norms of a training step with and without the setting."""
    norms = []
    for factor in (1.0, float(world)):
        torch.manual_seed(0)
        model = Tiny()
        settings = {"gradient_predivide_factor": factor}
        zero = {"stage": 3, "reduce_scatter": False}
        engine = make_engine(model, torch.optim.AdamW(model.parameters()), zero, settings=settings)
        engine.backward(token_losses(engine, make_batch(rank)).mean())
        engine.step()
        norms.append(float(engine.get_global_grad_norm()))
    with pytest.raises(UserError) as refusal:
        scored_steps(engine)
    return str(refusal.value), norms


def test_a_division_that_deepspeed_does_not_take_back_is_refused(two_ranks: Workers) -> None:
    for refusal, (right, halved) in two_ranks.run(_predivided):
        assert refusal.startswith("gradient_predivide_factor 2 at ZeRO stage 3")
        assert halved == pytest.approx(right / 2, rel=1e-3)  # canary: else it need not be refused any more


def _unlike_plain_training(rank: int, world: int) -> list[str]:
    """What is said to a leaf module, and to parameters that the optimizer does not have."""
    from deepspeed.utils import set_z3_leaf_modules

    model = Tiny()
    set_z3_leaf_modules(model, [torch.nn.LayerNorm])
    leaf = make_engine(model, torch.optim.AdamW(model.parameters()), {"stage": 3})
    model = Tiny()
    part = make_engine(model, torch.optim.AdamW(model.hidden.parameters()), {"stage": 0})
    refusals = []
    for engine in (leaf, part):
        with pytest.raises(UserError) as refusal:
            scored_steps(engine)
        refusals.append(str(refusal.value))
    return refusals


def test_leaf_modules_and_parameters_that_are_not_stepped_are_refused(two_ranks: Workers) -> None:
    for leaf, part in two_ranks.run(_unlike_plain_training):
        assert leaf.startswith("ZeRO-3 leaf module norm:")
        assert part.startswith(
            "the optimizer does not step embedding.weight, norm.weight, norm.bias, output.weight"
        )


def _unlike_one_step(rank: int, world: int) -> list[str]:
    """What is said where a step's microbatches are two steps of the optimizer, or none."""
    from inrun_megatron import InRunShapley, ShapleyTarget

    refusals = []
    for settings, microbatches in (({"managed_gradient_accumulation": False}, 2), ({}, 1)):
        model = Tiny()
        optimizer = torch.optim.AdamW(model.parameters())
        engine = make_engine(
            model, optimizer, {"stage": 1}, settings={"gradient_accumulation_steps": 2, **settings}
        )
        target = ShapleyTarget("held_out", [make_batch(50 + rank)], num_tokens=world * ROWS * LENGTH)
        shapley = InRunShapley(engine, [target], token_losses)
        with pytest.raises(UserError) as refusal, shapley.step(1) as step:
            for micro in map(make_batch, range(microbatches)):
                with step.samples(torch.zeros(ROWS), torch.arange(ROWS), micro["loss_mask"]):
                    engine.backward(token_losses(engine, micro).mean())
                    engine.step()
        shapley.close()
        refusals.append(str(refusal.value))
    return refusals


def test_a_scored_step_is_one_step_of_the_optimizer(two_ranks: Workers) -> None:
    for two, none in two_ranks.run(_unlike_one_step):
        assert two.startswith("step 1 saw 2 microbatches and 2 steps of the engine's optimizer")
        assert none.startswith("step 1 saw 1 microbatches and 0 steps of the engine's optimizer")


def _unlike_the_engine(rank: int, world: int) -> str:
    from inrun_megatron import PipelineShapley, ShapleyTarget

    with pytest.raises(UserError) as refusal:
        PipelineShapley(
            make_pipeline(2)[0], [ShapleyTarget("held_out", [make_batch(1)], ROWS * LENGTH)], Loss()
        )
    return str(refusal.value)


def test_a_layout_unlike_the_engines_is_refused(two_ranks: Workers) -> None:
    for refusal in two_ranks.run(_unlike_the_engine):
        assert refusal.startswith("the engine has 1 data-parallel ranks, the layout 2")


def _along_another_gradient(rank: int, world: int, stage: int) -> str:
    torch.manual_seed(0)
    model = Tiny()
    engine = make_engine(model, torch.optim.AdamW(model.parameters(), lr=1e-3), {"stage": stage})
    with pytest.raises(UserError) as refusal:
        scored_steps(engine, 1, factor=0.5, estimator="midpoint")
    return str(refusal.value)


@pytest.mark.parametrize("stage", [0, 1])
def test_a_path_along_another_gradient_is_refused(two_ranks: Workers, stage: int) -> None:
    """``engine.backward`` gets half of what ``training_loss`` says. Additivity holds along any path."""
    for refusal in two_ranks.run(_along_another_gradient, stage):
        assert refusal.startswith("estimator midpoint integrated along a gradient of norm")


def _along_nothing_finite(rank: int, world: int) -> str:
    torch.manual_seed(0)
    model = Tiny()
    engine = make_engine(model, torch.optim.AdamW(model.parameters(), lr=1e-3), {"stage": 0})
    return scored_steps(engine, 1, factor=float("nan"), estimator="midpoint")[0].status


def test_a_step_that_is_not_finite_is_skipped_and_no_other_path(two_ranks: Workers) -> None:
    assert two_ranks.run(_along_nothing_finite) == ["skipped: values are not finite"] * 2


def _along_other_microbatches(rank: int, world: int, zero: int, clip: float) -> tuple[str, float, float]:
    torch.manual_seed(0)
    model = Tiny()
    engine = make_engine(model, torch.optim.AdamW(model.parameters(), lr=1e-3), {"stage": zero}, clip)
    with pytest.raises(UserError) as refusal:
        scored_steps(engine, 1, announced=make_batch(38 + rank), estimator="midpoint")
    integrated, stepped, share = re.findall(r"norm ([\d.]+)|([\d.]+) times", str(refusal.value))
    return str(refusal.value), float(integrated[0]) / float(stepped[0]), float(share[1])


@pytest.mark.parametrize(("zero", "clip"), [(1, 0.1), (3, 1e9)])
def test_a_path_along_other_microbatches_is_refused(two_ranks: Workers, zero: int, clip: float) -> None:
    """Whose gradient is as long as that of those trained on."""
    for refusal, lengths, share in two_ranks.run(_along_other_microbatches, zero, clip):
        assert abs(lengths - 1.0) < 0.1, "this test wants gradients of about the same norm"
        assert share < 0.5 and "give step() the microbatches that are trained on" in refusal
