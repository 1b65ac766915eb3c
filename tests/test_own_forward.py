"""Layers with a forward of their own: values are those of the same function spelled with plain layers, or the layer is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inrun_megatron.errors import UserError
from inrun_megatron.taps import Pass, attach_taps
from tests.distributed import Workers
from tests.own_loop import LENGTH, ROWS, VOCABULARY, make_batch, make_engine, make_scored, token_losses

WIDTH, HEAD = 8, 4


class Scaled(nn.Embedding):
    """As Gemma has it."""

    def forward(self, ids: Tensor) -> Tensor:
        return 3.0 * super().forward(ids)


class Offset(nn.Embedding):
    """Positions as OPT has them."""

    def forward(self, positions: Tensor) -> Tensor:
        return super().forward(positions + 2)


class Normed(nn.Module):
    """RMSNorm as Llama has it, or Gemma (``zero``: centred at 0)."""

    def __init__(self, width: int, zero: bool = False) -> None:
        super().__init__()
        self.zero, self.weight = zero, nn.Parameter(0.1 * torch.randn(width) + (0.0 if zero else 1.0))

    def forward(self, hidden: Tensor) -> Tensor:
        normed = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6)
        return normed * (1.0 + self.weight) if self.zero else self.weight * normed


class InDouble(nn.LayerNorm):
    """A norm in another type."""

    def forward(self, x: Tensor) -> Tensor:
        shape = self.normalized_shape
        return F.layer_norm(x.double(), shape, self.weight.double(), self.bias.double(), self.eps).to(x.dtype)


class Clamped(nn.LayerNorm):
    """A norm with an epsilon of its own, of an input that is changed."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(2.0 * x, self.normalized_shape, weight=self.weight, bias=self.bias, eps=1e-3)


class Functional(nn.Module):
    """As nanoGPT has it; ``F.layer_norm`` has an epsilon of its own where it is given none."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.rand(width)), nn.Parameter(0.1 * torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(0.1 * x, self.gamma.shape, self.gamma, self.beta)


class Defaulted(nn.RMSNorm):
    """Its own epsilon is not the one it computes with."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(0.01 * x, weight=self.weight, normalized_shape=self.normalized_shape)


class Shift(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.shift, self.scale = nn.Parameter(0.1 * torch.randn(width)), nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class Gain(nn.Module):
    """One number."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([1.5]))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x


class Halved(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


class Spelled(nn.Module):
    """Every layer in a spelling of its own; positions ``[1, s]`` and ``[s]`` are broadcast, and the head sees ``[b * s, h]``."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = Scaled(VOCABULARY, WIDTH), Offset(LENGTH + 2, WIDTH)
        self.places = nn.Embedding(LENGTH, WIDTH)
        self.norm, self.heads, self.last = Normed(WIDTH, zero=True), Normed(HEAD), Clamped(WIDTH)
        self.first = Normed(HEAD)  # heads before positions
        self.hidden, self.shift, self.gain = Halved(WIDTH, WIDTH), Shift(WIDTH), Gain()
        self.functional, self.defaulted = Functional(WIDTH), Defaulted(WIDTH, eps=0.5)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        ids = torch.arange(tokens.shape[1])
        x = self.embedding(tokens) + self.positions(ids[None]) + self.places(ids)
        x = self.norm(x)
        x = self.heads(x.unflatten(-1, (-1, HEAD))).flatten(-2)
        x = self.first(x.unflatten(-1, (-1, HEAD)).transpose(1, 2)).transpose(1, 2).flatten(-2)
        x = self.gain(x + self.shift(F.gelu(self.hidden(x))))
        x = x + self.functional(x) + self.defaulted(x)
        return self.head(self.last(x).flatten(0, 1)).unflatten(0, tokens.shape)


class Plain(nn.Module):
    """The same function of the same numbers, spelled with plain layers; vectors are tables of one row, looked up by every token."""

    def __init__(self, like: Spelled) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH + 2, WIDTH)
        self.places = nn.Embedding(LENGTH, WIDTH)
        self.norm, self.heads, self.first = (nn.RMSNorm(n, eps=1e-6) for n in (WIDTH, HEAD, HEAD))
        self.last, self.hidden = nn.LayerNorm(WIDTH, eps=1e-3), nn.Linear(WIDTH, WIDTH)
        self.head, self.defaulted = nn.Linear(WIDTH, VOCABULARY), nn.RMSNorm(WIDTH)
        for name, own in self.named_children():
            own.load_state_dict(like.get_submodule(name).state_dict())
        self.functional = nn.LayerNorm(WIDTH)
        self.functional.load_state_dict(
            {"weight": like.functional.gamma.detach(), "bias": like.functional.beta.detach()}
        )
        with torch.no_grad():
            self.norm.weight += 1.0
        vectors = (like.shift.scale, like.shift.shift, like.gain.gain)
        self.scale, self.shift, self.gain = (
            nn.Embedding.from_pretrained(v[None], freeze=False) for v in vectors
        )

    def forward(self, tokens: Tensor) -> Tensor:
        ids = torch.arange(tokens.shape[1]).expand_as(tokens)
        x = 3.0 * self.embedding(tokens) + self.positions(ids + 2) + self.places(ids)
        x = self.norm(x)
        x = self.first(self.heads(x.unflatten(-1, (-1, HEAD)))).flatten(-2)
        first = torch.zeros_like(tokens)
        x = self.gain(first) * (x + F.gelu(0.5 * self.hidden(x)) * self.scale(first) + self.shift(first))
        x = x + self.functional(0.1 * x) + self.defaulted(0.01 * x)
        return self.head(self.last(2.0 * x))


def _values(rank: int, world: int, stage: int, by_token: bool, spelled: bool) -> Tensor:
    """Of two steps."""
    torch.manual_seed(3)
    model = Spelled() if spelled else Plain(Spelled())
    sgd = lambda module: torch.optim.SGD(module.parameters(), lr=0.1)  # noqa: E731
    engine, shapley = make_scored(rank, world, model, sgd, stage=stage, base="current")
    values = []
    for iteration in (1, 2):
        micro = make_batch(10 * iteration + rank)
        cut = torch.arange(LENGTH).expand(ROWS, LENGTH) if by_token else None
        with shapley.step(iteration) as step:
            with step.samples(torch.zeros(ROWS), torch.arange(ROWS), micro["loss_mask"], cut):
                engine.backward(token_losses(engine, micro).mean())
                engine.step()
        values.append(step.result.parts if by_token else step.result.values)
    shapley.close()
    return torch.stack(values)


def _near(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6 * float(b.abs().max()))


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_spelling_of_its_own_has_the_values_of_plain_layers(two_ranks: Workers, stage: int) -> None:
    spelled, plain = (two_ranks.run(_values, stage, False, own) for own in (True, False))
    for own, expected in zip(spelled, plain, strict=True):
        _near(own, expected)


def test_so_have_tokens(two_ranks: Workers) -> None:
    spelled, plain, whole = (
        two_ranks.run(_values, 1, *case) for case in ((True, True), (True, False), (False, False))
    )
    for own, expected, rows in zip(spelled, plain, whole, strict=True):
        _near(own, expected)
        _near(own.unflatten(1, (ROWS, LENGTH)).sum(2), rows)


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


def test_outside_a_pass_and_without_taps_the_forward_is_the_models_own() -> None:
    torch.manual_seed(0)
    model, tokens = Spelled(), make_batch(1)["tokens"]
    plain = model(tokens)
    taps = attach_taps(model)
    assert torch.equal(model(tokens), plain)
    taps.detach()
    assert torch.equal(model(tokens), plain) and "weight" not in model.norm.__dict__


class Padded(nn.Embedding):
    """The row that it passes gets no gradient, whatever the module's own is; negative ones count from the end."""

    passed: int | None = None

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight, self.passed)


@pytest.mark.parametrize(("passed", "own"), [(None, 3), (2, None), (-5, None)])
def test_an_embedding_trains_as_its_own_forward_says(passed: int | None, own: int | None) -> None:
    torch.manual_seed(0)
    embedding, ids = Padded(7, 4, padding_idx=own), torch.tensor([[1, 2, 3], [2, 3, 4]])
    embedding.passed = passed
    gradients = []
    for tapped in (False, True):
        if tapped:
            attach_taps(embedding)
        embedding.zero_grad()
        embedding(ids).square().sum().backward()
        gradients.append(embedding.weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_an_embedding_whose_forward_shares_rows_is_refused() -> None:
    class Renormed(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return F.embedding(ids, self.weight, max_norm=1.0)

    attach_taps(embedding := Renormed(7, 4))
    with pytest.raises(UserError, match="uses max_norm, sparse or scale_grad_by_freq"):
        embedding(torch.tensor([[1, 2]]))


def test_numbers_that_overflow_are_no_other_use() -> None:
    model = nn.Sequential(Normed(4))
    attach_taps(model)
    x = torch.tensor([[[1.0, float("inf"), 2.0, 3.0], [1.0, 2.0, 3.0, 4.0]]])
    assert model(x).isnan().any()


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
