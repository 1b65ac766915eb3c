"""DeepSpeed engines as a loop of one's own may have them: what is followed, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from inrun_megatron.engines.zero import _refuse_offload
from inrun_megatron.errors import UserError
from tests.distributed import Workers

VOCABULARY, LENGTH, ROWS = 23, 5, 3


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Workers]:
    with Workers(2) as workers:
        yield workers


class Tiny(torch.nn.Module):
    """Odd sizes: no parameter divides by the ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, 9)
        self.norm = torch.nn.LayerNorm(9)
        self.hidden = torch.nn.Linear(9, 13)
        self.output = torch.nn.Linear(13, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.output(F.gelu(self.hidden(self.norm(self.embedding(tokens)))))


def _token_losses(module: Any, batch: Any) -> torch.Tensor:
    logits = module(batch["tokens"])
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none").view_as(
        batch["labels"]
    )


def _batch(seed: int) -> dict[str, torch.Tensor]:
    text = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(seed))
    return {"tokens": text[:, :-1], "labels": text[:, 1:], "loss_mask": torch.ones(ROWS, LENGTH)}


def _engine(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    zero: dict[str, Any],
    clip: float = 0.1,
    settings: dict[str, Any] | None = None,
    **more: Any,
) -> Any:
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        **(settings or {}),
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config, **more)[0]


def _score(
    engine: Any, steps: int = 2, factor: float = 1.0, shares: tuple[int, ...] = (1, 1), **options: Any
) -> list[Any]:
    """The results of some steps; the first one's loss times ``factor``, ``shares`` validation microbatches per rank."""
    from inrun_megatron import InRunShapley, ShapleyTarget

    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    held_out = [_batch(50 + rank + world * i) for i in range(shares[rank])]
    target = ShapleyTarget("held_out", held_out, num_tokens=sum(shares) * ROWS * LENGTH)
    shapley, results = InRunShapley(engine, [target], _token_losses, **options), []
    for iteration in range(1, steps + 1):
        micro = _batch(10 * iteration + rank)
        with shapley.step(iteration, [micro]) as step:
            with step.samples(torch.zeros(ROWS), torch.arange(ROWS), micro["loss_mask"]):
                engine.backward(_token_losses(engine, micro).mean() * (factor if iteration == 1 else 1.0))
                engine.step()
        results.append(step.result)
    shapley.close()
    return results


def _resume(rank: int, world: int, stage: int, directory: str) -> list[tuple[Any, ...]]:
    torch.manual_seed(0)
    first = Tiny()
    engine = _engine(first, torch.optim.AdamW(first.parameters()), {"stage": stage}, clip=0.1)
    engine.save_checkpoint(directory, tag="start")
    second = Tiny()
    engine = _engine(second, torch.optim.AdamW(second.parameters()), {"stage": stage}, clip=0.01)
    engine.load_checkpoint(directory, tag="start")
    return [(r.gradient_norm, r.clip_coefficient, r.additivity_lhs, r.additivity_rhs) for r in _score(engine)]


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
    results = _score(_engine(model, torch.optim.AdamW(groups, lr=1e-2), {"stage": stage}))
    return [(r.values, r.additivity_lhs, r.additivity_rhs) for r in results]


def test_a_parameter_group_may_be_frozen_as_a_whole(two_ranks: Workers) -> None:
    """At stages 1 and 2 DeepSpeed itself takes no such group."""
    whole, sharded = (two_ranks.run(_frozen_group, stage)[0] for stage in (0, 3))
    for (values, left, right), (others, *_) in zip(whole, sharded, strict=True):
        assert left == pytest.approx(right, rel=1e-3)
        torch.testing.assert_close(values, others, rtol=1e-3, atol=1e-6)


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
        _refuse_offload(config)


def _diverging(rank: int, world: int) -> list[tuple[str, float]]:
    torch.manual_seed(0)
    model = Tiny()
    engine = _engine(model, torch.optim.AdamW(model.parameters()), {"stage": 0})
    return [(r.status, r.clip_coefficient) for r in _score(engine, factor=1e22)]


def test_a_norm_that_is_not_finite_leaves_a_step_without_values(two_ranks: Workers) -> None:
    """In fp32 at stage 0 DeepSpeed clips such a gradient, whose squares overflow, to zero."""
    first, second = two_ranks.run(_diverging)[0]
    assert first == ("skipped: values are not finite", 0.0)
    assert second[0] == "scored"


def _share(rank: int, world: int, stage: int) -> str:
    model = Tiny()
    engine = _engine(model, torch.optim.AdamW(model.parameters()), {"stage": stage})
    with pytest.raises(UserError) as refusal:
        _score(engine, shares=(2, 1))
    return str(refusal.value)


def test_ranks_must_have_equally_many_validation_microbatches(two_ranks: Workers) -> None:
    for refusal in two_ranks.run(_share, 3):
        assert "target held_out has 1 microbatches on one rank and 2 on another" in refusal


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


class _Noisy(Tiny):
    """It draws random numbers in evaluation mode, too."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.dropout(super().forward(tokens), 0.1, training=True)


def _rows_elsewhere(rank: int, world: int, kind: type[Tiny]) -> str:
    """With as many positions as rows; rank 0 has validation microbatches of one row, which tell nothing."""
    from inrun_megatron import InRunShapley, ShapleyTarget

    model = kind()
    engine = _engine(model, torch.optim.AdamW(model.parameters()), {"stage": 3})
    held_out = {name: tensor[: 1 if rank == 0 else None, :ROWS] for name, tensor in _batch(50).items()}
    shapley = InRunShapley(engine, [ShapleyTarget("held_out", [held_out], ROWS)], _token_losses)
    with pytest.raises(UserError) as refusal, shapley.step(1):
        pass
    return str(refusal.value)


@pytest.mark.parametrize("kind", [_Flipped, _SequenceFirst])
def test_rows_in_other_places_are_refused(two_ranks: Workers, kind: type[Tiny]) -> None:
    """Their values would be other samples', and still add up to the gradient; all ranks stop."""
    other, own = two_ranks.run(_rows_elsewhere, kind)
    assert own.startswith("layer hidden does not have the microbatch's rows apart and in order")
    assert other.startswith("a layer on another rank does not have")


def _draws(rank: int, world: int) -> list[bool]:
    from inrun_megatron import InRunShapley, ShapleyTarget

    model, same = _Noisy(), []
    engine = _engine(model, torch.optim.AdamW(model.parameters()), {"stage": 1})
    target = ShapleyTarget("held_out", [_batch(50 + rank)], world * ROWS * LENGTH)
    shapley, micro = InRunShapley(engine, [target], _token_losses), _batch(rank)
    for iteration in (1, 2):
        before = torch.get_rng_state()
        with (
            shapley.step(iteration) as step,
            step.samples(torch.zeros(ROWS), torch.arange(ROWS), micro["loss_mask"]),
        ):
            same.append(torch.equal(torch.get_rng_state(), before))
            engine.backward(_token_losses(engine, micro).mean())
            engine.step()
    shapley.close()
    return same


def test_a_model_that_draws_in_evaluation_mode_trains_as_without_scoring(two_ranks: Workers) -> None:
    for same in two_ranks.run(_draws):
        assert same == [True, True]


def _split_sequences(rank: int, world: int) -> str:
    model = Tiny()
    engine = _engine(model, torch.optim.AdamW(model.parameters()), {"stage": 0}, mesh_param=(1, 2))
    with pytest.raises(UserError) as refusal:
        _score(engine)
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


def _added_up(rank: int, world: int, stage: int, estimator: str) -> list[torch.Tensor]:
    """Values where the ranks' gradients are averaged, and where those of ``1 / world`` times the loss are added up."""
    values = []
    for operation, factor in (("mean", 1.0), ("sum", 1.0 / world)):
        torch.manual_seed(0)
        model = Tiny()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        settings = {"gradient_allreduce_op": operation}
        engine = _engine(model, optimizer, {"stage": stage}, clip=0.0, settings=settings)

        def loss(losses: torch.Tensor, micro: Any, factor: float = factor) -> torch.Tensor:
            return losses.mean() * factor

        values.append(_score(engine, 1, factor, estimator=estimator, training_loss=loss)[0].values)
    return values


@pytest.mark.parametrize(("stage", "estimator"), [(0, "first_order"), (2, "midpoint")])
def test_gradients_may_be_added_up_over_ranks(two_ranks: Workers, stage: int, estimator: str) -> None:
    for averaged, added in two_ranks.run(_added_up, stage, estimator):
        torch.testing.assert_close(added, averaged, rtol=1e-5, atol=1e-9)


def _predivided(rank: int, world: int) -> tuple[str, list[float]]:
    """The refusal, and the gradient norms of a training step with and without the setting."""
    norms = []
    for factor in (1.0, float(world)):
        torch.manual_seed(0)
        model = Tiny()
        settings = {"gradient_predivide_factor": factor}
        zero = {"stage": 3, "reduce_scatter": False}
        engine = _engine(model, torch.optim.AdamW(model.parameters()), zero, settings=settings)
        engine.backward(_token_losses(engine, _batch(rank)).mean())
        engine.step()
        norms.append(float(engine.get_global_grad_norm()))
    with pytest.raises(UserError) as refusal:
        _score(engine)
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
    leaf = _engine(model, torch.optim.AdamW(model.parameters()), {"stage": 3})
    model = Tiny()
    part = _engine(model, torch.optim.AdamW(model.hidden.parameters()), {"stage": 0})
    refusals = []
    for engine in (leaf, part):
        with pytest.raises(UserError) as refusal:
            _score(engine)
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
        engine = _engine(
            model, optimizer, {"stage": 1}, settings={"gradient_accumulation_steps": 2, **settings}
        )
        target = ShapleyTarget("held_out", [_batch(50 + rank)], num_tokens=world * ROWS * LENGTH)
        shapley = InRunShapley(engine, [target], _token_losses)
        with pytest.raises(UserError) as refusal, shapley.step(1) as step:
            for micro in map(_batch, range(microbatches)):
                with step.samples(torch.zeros(ROWS), torch.arange(ROWS), micro["loss_mask"]):
                    engine.backward(_token_losses(engine, micro).mean())
                    engine.step()
        shapley.close()
        refusals.append(str(refusal.value))
    return refusals


def test_a_scored_step_is_one_step_of_the_optimizer(two_ranks: Workers) -> None:
    for two, none in two_ranks.run(_unlike_one_step):
        assert two.startswith("step 1 saw 2 microbatches and 2 steps of the engine's optimizer")
        assert none.startswith("step 1 saw 1 microbatches and 0 steps of the engine's optimizer")


class _Loss:
    """The loss of a pipeline of Tiny's layers."""

    def split(self, microbatch: Any) -> tuple[Any, Any]:
        return microbatch["tokens"], microbatch["labels"]

    def token_losses(self, outputs: Any, labels: Any) -> torch.Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)

    def __call__(self, outputs: Any, labels: Any) -> torch.Tensor:
        return self.token_losses(outputs, labels).mean()


def _pipeline(stages: int) -> tuple[Any, Tiny]:
    """An engine around a PipelineModule that knows nothing of Megatron, and the model that its layers are of."""
    import deepspeed
    from deepspeed.pipe import PipelineModule

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    torch.manual_seed(0)
    model = Tiny()
    layers = [model.embedding, model.norm, model.hidden, F.gelu, model.output]
    module = PipelineModule(layers, num_stages=stages, loss_fn=_Loss(), partition_method="uniform")
    return _engine(module, torch.optim.AdamW(module.parameters()), {"stage": 0}), model


def _one_stage(rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
    """First values through a pipeline of one stage, and without a pipeline."""
    import copy

    from inrun_megatron import InRunShapley, PipelineShapley, ShapleyTarget

    engine, model = _pipeline(1)
    model = copy.deepcopy(model)
    micro = _batch(10 + rank) | {"dataset": torch.zeros(ROWS), "sample": torch.arange(ROWS)}
    target = ShapleyTarget("held_out", [_batch(50 + rank)], num_tokens=world * ROWS * LENGTH)
    shapley = PipelineShapley(engine, [target], _Loss(), base="current")
    with shapley.step(1) as step:
        step.train_batch([micro])
    through = step.result.values
    engine = _engine(model, torch.optim.AdamW(model.parameters()), {"stage": 0})
    with InRunShapley(engine, [target], _token_losses, base="current").step(1) as step:
        with step.samples(micro["dataset"], micro["sample"], micro["loss_mask"]):
            engine.backward(_token_losses(engine, micro).mean())
            engine.step()
    return through, step.result.values


def test_a_pipeline_of_one_stage_has_the_values_of_none(two_ranks: Workers) -> None:
    """Its ranks are replicas: the norms of the targets' gradients are summed over them once."""
    for through, without in two_ranks.run(_one_stage):
        torch.testing.assert_close(through, without, rtol=1e-4, atol=1e-9)


def _unlike_the_engine(rank: int, world: int) -> str:
    from inrun_megatron import PipelineShapley, ShapleyTarget

    with pytest.raises(UserError) as refusal:
        PipelineShapley(_pipeline(2)[0], [ShapleyTarget("held_out", [_batch(1)], ROWS * LENGTH)], _Loss())
    return str(refusal.value)


def test_a_layout_unlike_the_engines_is_refused(two_ranks: Workers) -> None:
    for refusal in two_ranks.run(_unlike_the_engine):
        assert refusal.startswith("the engine has 1 data-parallel ranks, the layout 2")


def _credited(rank: int, world: int, betas: tuple[float, float], credit: str) -> list[float | None] | str:
    """Credit factors of two steps of a model whose vectors have ``betas``; or the refusal."""
    torch.manual_seed(0)
    model = Tiny()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1]},
        {"params": [p for p in model.parameters() if p.dim() == 1], "betas": betas},
    ]
    engine = _engine(model, torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99)), {"stage": 1})
    try:
        return [result.credit_factor for result in _score(engine, credit=credit, total_steps=2)]
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
        engine = _engine(model, optimizer, {"stage": stage}, clip=clip, settings=settings)
        if dynamic:
            engine.optimizer.loss_scaler.last_overflow_iter = -2  # so that a window ends with the first step

        def loss(losses: torch.Tensor, micro: Any, factor: float = factor) -> torch.Tensor:
            return losses.mean() * factor

        results.append(_score(engine, 1, factor, estimator=estimator, training_loss=loss)[0])
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


def _along_another_gradient(rank: int, world: int, stage: int) -> str:
    torch.manual_seed(0)
    model = Tiny()
    engine = _engine(model, torch.optim.AdamW(model.parameters(), lr=1e-3), {"stage": stage})
    with pytest.raises(UserError) as refusal:
        _score(engine, 1, factor=0.5, estimator="midpoint")
    return str(refusal.value)


@pytest.mark.parametrize("stage", [0, 1])
def test_a_path_along_another_gradient_is_refused(two_ranks: Workers, stage: int) -> None:
    """``engine.backward`` gets half of what ``training_loss`` says. Additivity holds along any path."""
    for refusal in two_ranks.run(_along_another_gradient, stage):
        assert refusal.startswith("estimator midpoint integrated along a gradient of norm")
