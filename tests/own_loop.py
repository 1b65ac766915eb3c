"""A small model in a DeepSpeed engine, as a loop of one's own may have it, and some scored steps of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from inrun_megatron.errors import UserError

VOCABULARY, LENGTH, ROWS = 23, 5, 3


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


def token_losses(module: Any, batch: Any) -> torch.Tensor:
    logits = module(batch["tokens"])
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none").view_as(
        batch["labels"]
    )


def make_batch(seed: int) -> dict[str, torch.Tensor]:
    text = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(seed))
    return {"tokens": text[:, :-1], "labels": text[:, 1:], "loss_mask": torch.ones(ROWS, LENGTH)}


def make_engine(
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


def scored_steps(
    engine: Any,
    steps: int = 2,
    factor: float = 1.0,
    shares: tuple[int, ...] = (1, 1),
    announced: Any = None,
    **options: Any,
) -> list[Any]:
    """The results of some steps; the first one's loss times ``factor``, ``shares`` validation microbatches per rank.

    ``announced``: the microbatch that ``step()`` is given, if it is not the one that is trained on.
    """
    from inrun_megatron import InRunShapley, ShapleyTarget

    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    held_out = [make_batch(50 + rank + world * i) for i in range(shares[rank])]
    target = ShapleyTarget("held_out", held_out, num_tokens=sum(shares) * ROWS * LENGTH)
    shapley, results = InRunShapley(engine, [target], token_losses, **options), []
    for iteration in range(1, steps + 1):
        micro = make_batch(10 * iteration + rank)
        with shapley.step(iteration, [micro if announced is None else announced]) as step:
            with step.samples(torch.zeros(ROWS), torch.arange(ROWS), micro["loss_mask"]):
                engine.backward(token_losses(engine, micro).mean() * (factor if iteration == 1 else 1.0))
                engine.step()
        results.append(step.result)
    shapley.close()
    return results


def make_scored(
    rank: int,
    world: int,
    model: torch.nn.Module,
    optimizer: Callable[[torch.nn.Module], torch.optim.Optimizer] | None = None,
    stage: int = 0,
    accumulated: int = 1,
    loss: Any = token_losses,
    **options: Any,
) -> tuple[Any, Any]:
    """An engine, and an InRunShapley on it."""
    from inrun_megatron import InRunShapley, ShapleyTarget

    own = torch.optim.AdamW(model.parameters(), lr=1e-2) if optimizer is None else optimizer(model)
    settings = {"gradient_accumulation_steps": accumulated}
    engine = make_engine(model, own, {"stage": stage}, settings=settings)
    target = ShapleyTarget("held_out", [make_batch(50 + rank)], num_tokens=world * ROWS * LENGTH)
    return engine, InRunShapley(engine, [target], loss, **options)


def train_on(engine: Any, step: Any, seed: int) -> None:
    micro = make_batch(seed)
    with step.samples(torch.zeros(ROWS), torch.arange(ROWS), micro["loss_mask"]):
        engine.backward(token_losses(engine, micro).mean())
        engine.step()


def refusal_of(rank: int, world: int, case: Callable[..., Any], *args: Any) -> str:
    torch.manual_seed(0)
    with pytest.raises(UserError) as refusal:
        case(rank, world, *args)
    return str(refusal.value)


class Loss:
    """The loss of a pipeline of Tiny's layers."""

    def split(self, microbatch: Any) -> tuple[Any, Any]:
        return microbatch["tokens"], microbatch["labels"]

    def token_losses(self, outputs: Any, labels: Any) -> torch.Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)

    def __call__(self, outputs: Any, labels: Any) -> torch.Tensor:
        return self.token_losses(outputs, labels).mean()


def make_pipeline(
    stages: int, around_hidden: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> tuple[Any, Tiny]:
    """An engine around a PipelineModule that knows nothing of Megatron, and the model that its layers are of.

    ``around_hidden`` is applied before the hidden layer and after its activation.
    """
    import deepspeed
    from deepspeed.pipe import PipelineModule

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    torch.manual_seed(0)
    model = Tiny()
    other = [] if around_hidden is None else [around_hidden]
    layers = [model.embedding, model.norm, *other, model.hidden, F.gelu, *other, model.output]
    module = PipelineModule(layers, num_stages=stages, loss_fn=Loss(), partition_method="uniform")
    return make_engine(module, torch.optim.AdamW(module.parameters()), {"stage": 0}), model
