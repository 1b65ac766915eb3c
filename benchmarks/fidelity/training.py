"""Training the small GPT: once with values on a DeepSpeed engine, and again and again without, on other data.

Both train alike: fp32 AdamW, one process, the loss of a step `sum of the present rows' losses / (b s)` whatever rows are
present, so that leaving a sample out is what the game of one step means by it. `reproduces` of a scored run says how far
the plain loop's final losses are from the engine's.

Legend: N sequences of the corpus, T steps, b rows of a step, s tokens, K targets.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .model import Shape, SmallGPT, token_losses

Targets = dict[str, Tensor]
"""Name -> rows `[m, s + 1]`."""


@dataclass(frozen=True)
class Method:
    """An estimator as `InRunShapley` takes it."""

    name: str
    estimator: str = "first_order"
    base: str = "current"
    optimizer: str = "auto"


METHODS = (
    Method("SGD proxy", optimizer="sgd"),
    Method("first_order, current"),
    Method("first_order, drift", base="drift"),
    Method("midpoint", "midpoint"),
    Method("simpson", "simpson"),
)
DEFAULT = METHODS[2]


@dataclass(frozen=True)
class Recipe:
    """How to train; the learning rate rises over `warmup` steps and then falls in a line to a tenth."""

    shape: Shape = field(default_factory=Shape)
    steps: int = 100
    batch: int = 16
    lr: float = 1e-3
    warmup: int = 10
    weight_decay: float = 0.1
    clip: float = 1.0

    def lr_at(self, step: int) -> float:
        """Of a step, counted from 1."""
        if step <= self.warmup:
            return self.lr * step / self.warmup
        return self.lr * (1.0 - 0.9 * (step - self.warmup) / max(1, self.steps - self.warmup))

    def optimizer(self, model: torch.nn.Module) -> torch.optim.AdamW:
        parameters = list(model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.999))


def epochs(samples: int, recipe: Recipe, seed: int) -> Tensor:
    """Which sequence each row of each step is, `[T, b]`: the corpus in random order, again and again."""
    generator = torch.Generator().manual_seed(seed)
    needed = recipe.steps * recipe.batch
    rounds = [torch.randperm(samples, generator=generator) for _ in range(-(-needed // samples))]
    return torch.cat(rounds)[:needed].view(recipe.steps, recipe.batch)


@dataclass(frozen=True)
class ScoredRun:
    """Values of a run in the order of training.

    Attributes:
        values: step credit, `[T, b, K]`.
        factors: a step's trajectory credit over its step credit, `[T]`.
        target_losses: before every step, at the estimator's base point, `[T, K]`.
        final_losses: after the last step, `[K]`.
        row_losses: each row's mean loss when it was trained on, `[T, b]`.
        weights: after the last step.
    """

    order: Tensor
    values: Tensor
    factors: Tensor
    target_losses: Tensor
    final_losses: Tensor
    row_losses: Tensor
    weights: dict[str, Tensor]

    def credited(self, credit: str) -> Tensor:
        """Values `[T, b, K]` under `step` or `trajectory` credit."""
        return self.values if credit == "step" else self.values * self.factors[:, None, None]

    def by_sample(
        self, samples: int, credit: str = "step", first_step: int = 1, normalised: bool = False
    ) -> Tensor:
        """Sums over the steps from `first_step` on, `[N, K]`; normalised: in units of the step's mean |value|."""
        values = self.credited(credit)[first_step - 1 :]
        if normalised:
            values = values / values.abs().mean(1, keepdim=True)
        total = torch.zeros(samples, values.shape[-1], dtype=torch.float64)
        return total.index_add_(0, self.order[first_step - 1 :].flatten(), values.flatten(0, 1))

    def by_rule(self, samples: int) -> dict[str, Tensor]:
        """The sums that a user of the ledger would look at, `[N, K]` by name: raw or normalised, of all or late steps."""
        late = len(self.order) // 3 + 1
        return {
            f"{kind}, {when}": self.by_sample(samples, first_step=first, normalised=kind == "normalised")
            for kind in ("raw", "normalised")
            for when, first in (("whole run", 1), ("last two thirds", late))
        }


def scored_run(
    recipe: Recipe, corpus: Tensor, order: Tensor, targets: Targets, method: Method, seed: int
) -> ScoredRun:
    """Train on a DeepSpeed engine (ZeRO 1, one process) with values by `InRunShapley`."""
    from inrun_megatron import InRunShapley, ShapleyTarget

    model = SmallGPT(recipe.shape, seed)
    found: dict[str, list[Tensor]] = {"values": [], "factors": [], "target_losses": [], "row_losses": []}

    def losses(module: torch.nn.Module, batch: Any) -> Tensor:
        return token_losses(module, batch["rows"])

    def microbatch(rows: Tensor) -> dict[str, Tensor]:
        return {"rows": rows, "loss_mask": torch.ones(rows[:, 1:].shape)}

    with _engine(recipe, model) as engine:
        shapley = InRunShapley(
            engine,
            [ShapleyTarget(name, [microbatch(rows)], rows[:, 1:].numel()) for name, rows in targets.items()],
            losses,
            estimator=method.estimator,
            base=method.base,
            optimizer=method.optimizer,
            total_steps=recipe.steps,
        )
        for t, samples in enumerate(order, start=1):
            for group in engine.optimizer.param_groups:
                group["lr"] = recipe.lr_at(t)
            batch = microbatch(corpus[samples])
            with shapley.step(t, [batch]) as step:
                tokens = batch["loss_mask"].sum(1)
                with step.samples(dataset=torch.zeros(len(samples)), sample=samples, tokens=tokens):
                    row_losses = losses(engine, batch)
                    engine.backward(row_losses.mean())
                    engine.step()
            result = step.result
            assert result.scored and result.values is not None, f"step {t}: {result.status}"
            found["values"].append(result.values)
            found["factors"].append(torch.tensor(result.credit_factor, dtype=torch.float64))
            found["target_losses"].append(torch.tensor(result.target_losses, dtype=torch.float64))
            found["row_losses"].append(row_losses.detach().mean(1))
        shapley.close()
    return ScoredRun(
        order=order,
        final_losses=target_losses(model, targets),
        weights={name: value.detach().clone() for name, value in model.state_dict().items()},
        **{name: torch.stack(parts) for name, parts in found.items()},
    )


@dataclass
class State:
    """A plain run before step `step`; `clip` is the coefficient of the step before."""

    model: SmallGPT
    optimizer: torch.optim.AdamW
    step: int = 1
    clip: float = 1.0

    @classmethod
    def fresh(cls, recipe: Recipe, seed: int, dtype: torch.dtype = torch.float32) -> State:
        model = SmallGPT(recipe.shape, seed).to(dtype)
        return cls(model, recipe.optimizer(model))

    def copy(self, recipe: Recipe) -> State:
        model = copy.deepcopy(self.model)
        optimizer = recipe.optimizer(model)
        optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        return State(model, optimizer, self.step)

    def train(
        self,
        recipe: Recipe,
        corpus: Tensor,
        order: Tensor,
        present: Tensor | None = None,
        stop: int | None = None,
        first_clip: float | None = None,
    ) -> Iterator[int]:
        """Up to and with step `stop` (None: the last); yields the number of every step taken.

        `present [T, b]` says which rows count; a step without any is still taken, with zero gradient. `first_clip` is
        the coefficient of the first step, whatever the norm is.
        """
        fixed = first_clip
        for t in range(self.step, (recipe.steps if stop is None else stop) + 1):
            samples = order[t - 1]
            kept = samples if present is None else samples[present[t - 1]]
            for group in self.optimizer.param_groups:
                group["lr"] = recipe.lr_at(t)
            self.optimizer.zero_grad(set_to_none=False)
            if len(kept):
                losses = token_losses(self.model, corpus[kept])
                (losses.sum() / (len(samples) * losses.shape[1])).backward()
                gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
                norm = float(torch.nn.utils.get_total_norm(gradients))
                self.clip = 1.0 / max(1.0, (norm + 1e-6) / recipe.clip) if fixed is None else fixed
                torch._foreach_mul_(gradients, self.clip)
            self.optimizer.step()
            self.step, fixed = t + 1, None
            yield t


def retrained(
    recipe: Recipe, corpus: Tensor, order: Tensor, targets: Targets, seed: int, present: Tensor | None = None
) -> Tensor:
    """The targets' losses `[K]` after a plain run."""
    state = State.fresh(recipe, seed)
    for _ in state.train(recipe, corpus, order, present):
        pass
    return target_losses(state.model, targets)


@torch.no_grad()
def target_losses(model: SmallGPT, targets: Targets) -> Tensor:
    """Mean loss per token of every target, `[K]` fp64."""
    sizes = [len(rows) for rows in targets.values()]
    losses = token_losses(model, torch.cat(list(targets.values()))).double().mean(1)
    return torch.stack([part.mean() for part in losses.split(sizes)])


@contextmanager
def _engine(recipe: Recipe, model: SmallGPT) -> Iterator[Any]:
    import deepspeed

    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
    if not dist.is_initialized():  # one process: no port to choose, nothing to collide with
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=recipe.optimizer(model),
        config={
            "train_micro_batch_size_per_gpu": recipe.batch,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": recipe.clip,
            "zero_optimization": {"stage": 1},
            "zero_allow_untested_optimizer": True,
        },
    )
    try:
        yield engine
    finally:
        engine.destroy()
