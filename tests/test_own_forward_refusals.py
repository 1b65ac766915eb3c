"""Layers with a forward of their own that taps cannot follow, in this pass or in another: refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inrun_megatron.errors import UserError
from inrun_megatron.taps import REGISTRY, Pass, Sharding, Site, Taps, attach_taps
from inrun_megatron.taps.linear import LinearCall, linear
from tests.distributed import Workers
from tests.own_layers import WIDTH, InDouble, Normed, Spelled
from tests.own_loop import LENGTH, ROWS, VOCABULARY, make_batch, make_engine, make_scored, token_losses


def _pass_through(model: nn.Module, ids: Tensor) -> None:
    """A validation pass."""
    taps = attach_taps(model)
    with taps.during(Pass(consumers=(lambda e: None,), detached=True, rows=2, positions=3)):
        loss = model(ids).square().sum()
        with taps.untouched(loss):
            loss.backward()


class Softmaxed(nn.Module):
    """Numbers of one token depend on all of the vector's; and ``along``: on all tokens', where every token has its own."""

    def __init__(self, along: int) -> None:
        super().__init__()
        self.along, self.weight = along, nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.softmax(self.along)


class Dropped(Normed):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.5)


class Selected(nn.Module):
    """As long as the features, and another thing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight[0]


class BatchNormed(nn.Module):
    """Rows change each other's losses in training, in validation they do not."""

    mean: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.register_buffer("mean", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x - (x.mean((0, 1)) if self.training else self.mean))


class First(Normed):
    """Of numbers that are all alike it shows only with others."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight[0]


class Averaged(First):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.mean()


class Pair(Normed):
    def forward(self, x: Tensor) -> Any:
        return self.weight * x, x


class PlusOne(nn.LayerNorm):
    """As Nemotron has it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight + 1.0, self.bias, self.eps)


class Transposed(nn.Linear):
    """As Falcon has it."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


@pytest.mark.parametrize(
    ("make", "refused"),
    [
        (lambda: Softmaxed(0), r"layer 1 \(Softmaxed\) has no tap, .*: it does something else with them"),
        (lambda: Dropped(4), r"layer 1 \(Dropped\) has no tap, .* or differs from call to call"),
        (lambda: Selected(4), r"layer 1 \(Selected\) has no tap, .*: it does something else with them"),
        (lambda: BatchNormed(4), r"have no tap: 1\.weight \(BatchNormed\); freeze"),
        (lambda: First(4), r"layer 1 \(First\) has no tap, .*: it does something else with them"),
        (lambda: Averaged(4), r"layer 1 \(Averaged\) has no tap, .*: it does something else with them"),
        (lambda: Pair(4), r"layer 1 \(Pair\) has no tap, .*: it does not return one tensor"),
        (lambda: Selected(5), r"layer 1 \(Selected\) has no tap, .* no input with 5 features"),
        (lambda: nn.GroupNorm(1, 3), r"layer 1 \(GroupNorm\) has no tap, .* no input with 3 features"),
        (lambda: nn.PReLU(), r"layer 1 \(PReLU\) has no tap, "),
        (
            lambda: PlusOne(4),
            r"parameter 1\.(weight|bias) is used outside its own module, or there in another way",
        ),
        (
            lambda: Transposed(4, 4),
            r"parameter 1\.(weight|bias) is used outside its own module, or there in another way",
        ),
        (
            lambda: InDouble(4),
            r"parameter 1\.(weight|bias) is used outside its own module, or there in another way",
        ),
    ],
)
def test_what_a_tap_cannot_follow_is_refused(make: Callable[[], nn.Module], refused: str) -> None:
    model: Any = nn.Sequential(nn.Embedding(7, 4), make())
    with pytest.raises(UserError, match=refused):
        _pass_through(model, torch.tensor([[1, 2, 3], [4, 5, 6]]))
    assert all(p.grad is None for p in model.parameters())


def test_a_softmax_over_features_is_followed() -> None:
    _pass_through(nn.Sequential(nn.Embedding(7, 4), Softmaxed(-1)), torch.tensor([[1, 2, 3], [4, 5, 6]]))


def test_parameters_that_no_forward_of_their_module_uses_are_missing() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ParameterList([torch.ones(4)]))
    with pytest.raises(UserError, match=r"1 of 3 trainable parameters have no tap: 1\.0 \(ParameterList\)"):
        attach_taps(model)


def test_an_embedding_whose_forward_shares_rows_is_refused() -> None:
    class Renormed(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return F.embedding(ids, self.weight, max_norm=1.0)

    attach_taps(embedding := Renormed(7, 4))
    with pytest.raises(UserError, match="uses max_norm, sparse or scale_grad_by_freq"):
        embedding(torch.tensor([[1, 2]]))


class InTraining(nn.Module):
    """``kind``: what it does in training alone."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embedding, self.scale = nn.Embedding(VOCABULARY, WIDTH), Mixing(WIDTH, kind)
        self.hidden, self.places = Dropping(WIDTH, WIDTH, kind), nn.Embedding(LENGTH, WIDTH)
        self.output = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        if self.kind == "unsqueezed":
            x = x + self.places(torch.arange(tokens.shape[1])).unsqueeze(0)
        if self.kind == "first of all":
            x = x + self.places(torch.arange(tokens.shape[1])[None])[0]
        x = self.scale(x) + self.hidden(x)
        if self.kind == "joined":
            return self.output(x.transpose(0, 1).flatten(0, 1)).unflatten(0, tokens.T.shape).transpose(0, 1)
        return self.output(x)


class Mixing(nn.Module):
    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.kind, self.weight = kind, nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        mixes = self.kind == "mixes" and self.training
        return self.weight * (x - x.mean((0, 1))) if mixes else self.weight * x


class Dropping(nn.Linear):
    def __init__(self, width: int, out: int, kind: str) -> None:
        super().__init__(width, out)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        weight = F.dropout(self.weight, 0.5, self.training) if self.kind == "drops" else self.weight
        return F.linear(x, weight, self.bias)


def _refused(rank: int, world: int, kind: str, rows: int) -> str:
    from inrun_megatron import InRunShapley, ShapleyTarget

    model = InTraining(kind)
    engine = make_engine(model, torch.optim.AdamW(model.parameters()), {"stage": 1})
    held_out = {name: column[:rows] for name, column in make_batch(50 + rank).items()}
    shapley = InRunShapley(
        engine, [ShapleyTarget("held_out", [held_out], world * rows * LENGTH)], token_losses
    )
    micro = make_batch(rank)
    with pytest.raises(UserError) as refusal, shapley.step(1) as step:
        with step.samples(torch.zeros(ROWS), torch.arange(ROWS), micro["loss_mask"]):
            engine.backward(token_losses(engine, micro).mean())
    return str(refusal.value)


@pytest.mark.parametrize(
    ("kind", "rows", "refused"),
    [
        ("drops", ROWS, "is used outside its own module, or there in another way"),
        ("unsqueezed", ROWS, "of embedding places, whose ids are the same for all rows: give it ids [b, s]"),
        ("mixes", ROWS, "does not have the microbatch's rows apart and in order"),
        ("first of all", ROWS, "does not have the microbatch's rows apart and in order"),
        ("joined", ROWS, "does not have the microbatch's rows apart and in order"),
        (
            "joined",
            1,
            "layer output sees rows and positions joined, 15 tokens, and whether they keep their rows",
        ),
    ],
)
def test_what_only_training_or_other_rows_show_is_refused(
    two_ranks: Workers, kind: str, rows: int, refused: str
) -> None:
    for said in two_ranks.run(_refused, kind, rows):
        assert refused in said


class Viewed(nn.Linear):
    """A tap that is given a view of its weight, or a bias where there is no place for one."""


def _own_taps(rank: int, world: int, kind: str) -> str:
    def tap(taps: Taps, module: Any, name: str) -> None:
        site = Site(name, "linear", Sharding.REPLICATED, batch_dim=0)
        weight = module.weight.view(VOCABULARY, -1) if kind == "view" else module.weight
        bias = module.bias if kind == "bias" else None
        module.forward = lambda x: linear(x, LinearCall(site, taps.current, weight, bias))
        taps.cover(Sharding.REPLICATED, module.weight, module.bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(REGISTRY, Viewed, tap)
        model = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), Viewed(WIDTH, VOCABULARY))
        _, shapley = make_scored(rank, world, model, stage=0)
        with pytest.raises(UserError) as refusal, shapley.step(1):
            pass
    return str(refusal.value)


@pytest.mark.parametrize(
    ("kind", "refused"),
    [
        (
            "view",
            "the tap of layer 1 was given a tensor of shape [23, 8] that is no parameter of the optimizer",
        ),
        ("bias", "layer 1: linear() adds no bias"),
    ],
)
def test_what_a_tap_of_ones_own_must_not_do(two_ranks: Workers, kind: str, refused: str) -> None:
    for said in two_ranks.run(_own_taps, kind):
        assert said.startswith(refused)


def _outside(rank: int, world: int) -> tuple[str, str]:
    from inrun_megatron import InRunShapley, ShapleyTarget

    engine, shapley = make_scored(rank, world, Spelled(), stage=1)
    micro = make_batch(rank)
    with pytest.raises(UserError) as late, shapley.step(1) as step:
        losses = token_losses(engine, micro)
        with step.samples(torch.zeros(ROWS), torch.arange(ROWS), micro["loss_mask"]):
            engine.backward(losses.mean())
            engine.step()
    shapley.close()
    maskless = {name: column for name, column in micro.items() if name != "loss_mask"}
    with pytest.raises(UserError) as mask:
        InRunShapley(engine, [ShapleyTarget("held_out", [maskless], 1)], token_losses)
    return str(late.value), str(mask.value)


def test_a_forward_outside_and_a_target_without_a_mask_are_refused(two_ranks: Workers) -> None:
    for late, mask in two_ranks.run(_outside):
        assert late.startswith("no layer was seen in microbatch 1 of step 1: its forward belongs inside")
        assert mask.startswith("a microbatch of target held_out has no loss_mask")
