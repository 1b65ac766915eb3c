"""Layers with a forward of their own: values are those of the same function spelled with plain layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inrun_megatron.taps import attach_taps
from tests.distributed import Workers
from tests.own_layers import Normed, Plain, Spelled
from tests.own_loop import LENGTH, ROWS, make_batch, make_scored, token_losses


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
        assert embedding.weight.grad is not None
        gradients.append(embedding.weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_numbers_that_overflow_are_no_other_use() -> None:
    model = nn.Sequential(Normed(4))
    attach_taps(model)
    x = torch.tensor([[[1.0, float("inf"), 2.0, 3.0], [1.0, 2.0, 3.0, 4.0]]])
    assert model(x).isnan().any()
