"""Experts and routers of one's own, as transformers has them: values are those of the same function spelled with plain layers."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inrun_megatron.errors import UserError
from inrun_megatron.taps import Pass, attach_taps
from inrun_megatron.taps.routing import Routing
from tests.distributed import Workers
from tests.own_experts import EXPERTS, TOPK, WIDTH, Mixture, Stacked
from tests.own_loop import LENGTH, ROWS, VOCABULARY, make_batch, make_scored, token_losses

SPELLINGS: dict[str, dict[str, bool]] = {
    "gated": {},
    "biases, transposed": {"bias": True, "transposed": True},
    "without a gate": {"gate": False, "bias": True},
}


def _values(
    rank: int, world: int, kind: str, stage: int, parts: str, stacked: bool, recompute: bool = False
) -> Tensor:
    """Of two steps, by sample or by part."""
    from tests.own_experts import Dense

    torch.manual_seed(3)
    model: Any = Mixture(**SPELLINGS[kind])
    model = model if stacked else Dense(model)
    if recompute:
        from torch.utils.checkpoint import checkpoint

        own = model.forward
        model.forward = lambda tokens: checkpoint(own, tokens, use_reentrant=False)
    sgd = lambda module: torch.optim.SGD(module.parameters(), lr=0.1)  # noqa: E731
    engine, shapley = make_scored(rank, world, model, sgd, stage=stage, base="current")
    values = []
    for iteration in (1, 2):
        micro = make_batch(10 * iteration + rank)
        cut = {"tokens": torch.arange(LENGTH), "documents": torch.arange(LENGTH) // 3}.get(parts)
        cut = None if cut is None else cut.expand(ROWS, LENGTH)
        with shapley.step(iteration) as step:
            with step.samples(torch.zeros(ROWS), torch.arange(ROWS), micro["loss_mask"], cut):
                engine.backward(token_losses(engine, micro).mean())
                engine.step()
        values.append(step.result.values if cut is None else step.result.parts)
    shapley.close()
    return torch.stack(values)


def _near(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6 * float(b.abs().max()))


@pytest.mark.parametrize("kind", SPELLINGS)
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_stacked_experts_have_the_values_of_plain_layers(two_ranks: Workers, kind: str, stage: int) -> None:
    stacked, plain = (two_ranks.run(_values, kind, stage, "samples", own) for own in (True, False))
    for own, expected in zip(stacked, plain, strict=True):
        assert expected.abs().max() > 0
        _near(own, expected)


@pytest.mark.parametrize("parts", ["tokens", "documents"])
def test_so_have_their_parts(two_ranks: Workers, parts: str) -> None:
    kind = "biases, transposed"
    stacked, plain, again = (
        two_ranks.run(_values, kind, *case)
        for case in ((1, parts, True), (1, parts, False), (0, parts, True, True))
    )
    for own, expected, recomputed in zip(stacked, plain, again, strict=True):
        _near(own, expected)
        _near(recomputed, expected)


def test_rows_that_lie_one_after_the_other() -> None:
    routed = torch.rand(3 * 4, 5).topk(2).indices
    mask = torch.zeros(12, 5, dtype=torch.bool).scatter(1, routed, True)
    sizes = mask.sum(0).tolist()
    routing = Routing.of_map(mask, sizes)
    routing.batch_first = True
    assert torch.equal(routing.rows(3) * 4 + routing.positions(3), routing.tokens)
    assert torch.equal(routing.owners, torch.arange(5).repeat_interleave(torch.tensor(sizes)))


def test_without_a_pass_the_forward_is_the_modules_own() -> None:
    torch.manual_seed(0)
    model, tokens = Mixture(bias=True), make_batch(1)["tokens"]
    plain = model(tokens)
    taps = attach_taps(model)
    assert torch.equal(model(tokens), plain)
    with taps.during(Pass((lambda emission: None,), rows=ROWS, positions=LENGTH)):
        torch.testing.assert_close(model(tokens), plain)
    taps.detach()
    assert torch.equal(model(tokens), plain) and "weight" not in model.router.__dict__


def _gradients(model: nn.Module, x: Tensor, detached: bool = False) -> list[Tensor | None]:
    taps = attach_taps(model)
    run = Pass((lambda emission: None,), detached=detached, rows=ROWS, positions=LENGTH)
    with taps.during(run):
        loss = model(x)[0].square().sum()
        if detached:
            with taps.untouched(loss):
                loss.backward()
        else:
            loss.backward()
    taps.detach()
    return [p.grad for p in model.parameters()]


class Odd(nn.Module):
    """A weight that F.linear is not given alone."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.weight = kind, nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        if self.kind == "scaled":
            return (F.linear(x, 2.0 * self.weight),)
        if self.kind == "cast, then scaled":
            return (F.linear(x.double(), self.weight.double() * 2.0),)
        if self.kind in ("cast, then scaled in place", "a cast without gradients"):
            with torch.no_grad() if "without" in self.kind else nullcontext():
                weight = self.weight.to(torch.float64, copy=True)
            return (F.linear(x.double(), weight if "without" in self.kind else weight.mul_(0.5)),)
        if self.kind == "in halves" and x.shape[1] > 2:
            return (torch.cat([self(part)[0] for part in x.split(2, 1)], 1),)
        if self.kind == "a penalty beside it":
            return (F.linear(x, self.weight) + self.weight.square().sum(),)
        return (F.linear(x.double(), self.weight.to(torch.float64)) + F.linear(x, self.weight),)


@pytest.mark.parametrize(
    "kind", ["scaled", "cast, then scaled", "cast, then scaled in place", "a penalty beside it"]
)
def test_a_weight_that_is_used_otherwise_is_refused(kind: str) -> None:
    with pytest.raises(UserError, match=r"parameter weight is used outside its own module, or there in"):
        _gradients(Odd(kind), torch.randn(ROWS, LENGTH, 4), detached=True)


def test_a_constant_stays_one() -> None:
    model, x = Odd("a cast without gradients"), torch.randn(ROWS, LENGTH, 4, requires_grad=True)
    assert _gradients(model, x) == [None]


@pytest.mark.parametrize("kind", ["twice", "in halves"])
def test_a_weight_that_is_cast_or_used_twice_is_followed(kind: str) -> None:
    torch.manual_seed(0)
    model, x = Odd(kind), torch.randn(ROWS, LENGTH, 4)
    model(x)[0].square().sum().backward()
    assert model.weight.grad is not None
    expected = model.weight.grad.clone()
    model.weight.grad = None
    torch.testing.assert_close(_gradients(model, x)[0], expected)
    model.weight.grad = None
    assert _gradients(model, x, detached=True) == [None]


class Looked(nn.Module):
    """A table, which is no linear layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


def test_a_table_of_ones_own_is_refused_at_once() -> None:
    with pytest.raises(UserError, match=r"have no tap: 0\.weight \(Looked\)"):
        attach_taps(nn.Sequential(Looked()))


class Half(Stacked):
    def forward(self, *given: Tensor) -> Tensor:
        return 0.5 * super().forward(*given)


def _pass(experts: Stacked, tokens: int, positions: int | None, chosen: int = EXPERTS) -> None:
    taps = attach_taps(nn.Sequential(experts))
    try:
        with taps.during(Pass((lambda emission: None,), rows=ROWS, positions=positions)):
            experts(
                torch.randn(tokens, WIDTH), torch.randint(chosen, (tokens, TOPK)), torch.rand(tokens, TOPK)
            )
    finally:
        taps.detach()


def test_other_experts_and_tokens_are_refused() -> None:
    torch.manual_seed(0)
    plain = {"bias": False, "transposed": False, "gate": True}
    with pytest.raises(UserError, match=r"layer 0 \(Half\) computes something else than stacked experts do"):
        _pass(Half(**plain), ROWS * LENGTH, LENGTH)
    experts = Stacked(**plain)
    with pytest.raises(UserError, match=r"layer 0 sees 9 tokens joined, of a microbatch of 3 rows of 5 pos"):
        _pass(experts, 9, LENGTH)
    with pytest.raises(UserError, match=r"layer 0 sees 9 tokens joined, of a microbatch of 3 rows: values"):
        _pass(experts, 9, None)
    with pytest.raises(UserError, match=r"layer 0 is told of expert \d+ and has 4"):
        _pass(experts, ROWS * LENGTH, LENGTH, chosen=3 * EXPERTS)
    _pass(experts, ROWS * LENGTH, LENGTH)


def test_experts_of_which_a_part_is_frozen_or_spread_are_refused() -> None:
    model = Mixture()
    model.experts.down_proj.requires_grad_(False)
    with pytest.raises(UserError, match=r"layer experts \(Stacked\) trains gate_up_proj of down_proj, gate_"):
        attach_taps(model)
    model.experts.gate_up_proj.requires_grad_(False)
    attach_taps(model).detach()  # frozen experts are no tap's business
    spread = Mixture()
    spread.experts._is_expert_parallel = True
    with pytest.raises(UserError, match="_is_expert_parallel"):
        attach_taps(spread)
    assert len(model.embedding.weight) == VOCABULARY
