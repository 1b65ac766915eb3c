"""Taps: what one must not change or leave out, and the layers that are refused."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inrun_megatron.errors import UserError
from inrun_megatron.shapley.consumers import RowScorer
from inrun_megatron.taps import Emission, Pass, attach_taps
from inrun_megatron.taps.emission import Sharding, Site


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [nn.RMSNorm, nn.LayerNorm, lambda h: nn.RMSNorm(h, eps=1e-3)])
def test_a_tapped_norm_is_the_plain_one(make: type[nn.Module], dtype: torch.dtype) -> None:
    """torch's own epsilons, too: RMSNorm's default is that of the type it computes in, whatever the weights'."""
    norm = make(16).to(dtype)
    x = (0.02 * torch.randn(4, 3, 16)).to(dtype)
    plain = norm(x)
    attach_taps(norm)
    torch.testing.assert_close(norm(x), plain, rtol=2 * torch.finfo(dtype).eps, atol=0.0)


def _layers() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.RMSNorm(4), nn.Linear(4, 4))


def test_a_forward_of_an_instances_own_is_not_replaced() -> None:
    """Neither somebody's wrapper nor the taps of another InRunShapley; and the refusal leaves no tap behind."""
    model = _layers()
    model[3].forward = lambda x: 3.0 * F.linear(x, model[3].weight)  # type: ignore[arg-type]
    ids = torch.tensor([[1, 2]])
    plain = model(ids)
    with pytest.raises(UserError, match="layer 3 has a forward of its own on the instance"):
        attach_taps(model)
    assert torch.equal(model(ids), plain) and "forward" not in model[0].__dict__
    del model[3].forward
    taps = attach_taps(model)
    with pytest.raises(UserError, match="layer 0 has a forward of its own"):
        attach_taps(model)
    taps.require_unchanged()
    taps.detach()
    attach_taps(model)


def test_a_bias_that_trains_beside_a_frozen_weight_says_what_is_wrong() -> None:
    model = _layers()
    model[1].weight.requires_grad_(False)
    with pytest.raises(UserError) as refusal:
        attach_taps(model)
    assert "1.bias (LayerNorm); a layer has one where its weight trains" in str(refusal.value)
    assert "supported" not in str(refusal.value)


def test_a_copy_of_a_tapped_model_computes_with_its_own_weights() -> None:
    model = _layers()
    ids = torch.tensor([[1, 2]])
    plain = model(ids)
    attach_taps(model)
    average = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.zero_()
    assert not average(ids).any() and torch.equal(model(ids), plain)
    attach_taps(average)


def test_layers_take_their_input_by_torchs_name() -> None:
    embedding, layer_norm, rms_norm, linear = model = _layers()
    ids = torch.tensor([[1, 2]])
    plain = model(ids)
    attach_taps(model)
    assert torch.equal(linear(input=rms_norm(x=layer_norm(input=embedding(input=ids)))), plain)


def test_what_changes_after_taps_are_attached_is_named() -> None:
    model = _layers()
    model[1].bias.requires_grad_(False)
    taps = attach_taps(model)
    taps.require_unchanged()
    for parameter, name, now in ((model[3].weight, "3.weight", "frozen"), (model[1].bias, "1.bias", "made")):
        parameter.requires_grad_(not parameter.requires_grad)
        with pytest.raises(UserError, match=f"parameter {name} has been {now}"):
            taps.require_unchanged()
        parameter.requires_grad_(not parameter.requires_grad)
    model[2].forward = lambda x: x
    with pytest.raises(UserError, match="layer 2 has lost its tap"):
        taps.require_unchanged()
    taps.detach()
    assert "forward" in model[2].__dict__, "not ours to remove"
    with pytest.raises(UserError, match=r"taken out by close\(\)"):
        taps.require_unchanged()


def test_autocast_is_refused() -> None:
    model = _layers()
    attach_taps(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(UserError, match=r"layer 1 runs under torch\.autocast"):
            model(torch.tensor([[1, 2]]))
        with torch.autocast("cpu", enabled=False):
            model(torch.tensor([[1, 2]]))


def test_layers_whose_rows_change_each_others_losses_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False))
    with pytest.raises(UserError, match="layer 1 is a BatchNorm1d"):
        attach_taps(model)
    model[1].eval()
    assert attach_taps(model).coverage().tapped == 2


def test_multi_token_prediction_is_refused() -> None:
    """Its loss reaches the weights past the token losses, in a validation pass too."""
    from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlock

    class Block(MultiTokenPredictionBlock):
        def __init__(self) -> None:
            nn.Module.__init__(self)

    with pytest.raises(UserError, match="layer 1 predicts further tokens"):
        attach_taps(nn.Sequential(nn.Linear(4, 4), Block()))


class _Tied(nn.Module):
    """An output layer on the embedding's weight, through a module of its own or past all modules."""

    def __init__(self, through_module: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.through_module = through_module

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        return self.head(x) if self.through_module else F.linear(x, self.embedding.weight)


def test_a_weight_that_is_used_past_its_tap_is_named() -> None:
    """Its part of the validation gradient would reach the optimizer, and its samples' values lack a part."""
    for through_module in (True, False):
        model = _Tied(through_module)
        seen: list[Emission] = []
        taps = attach_taps(model)

        def validate() -> None:
            with taps.during(Pass(consumers=(seen.append,), detached=True)):  # noqa: B023
                loss = model(torch.tensor([[1, 2, 3]])).square().sum()  # noqa: B023
                with taps.untouched():  # noqa: B023
                    loss.backward()

        if through_module:
            validate()
            validate()  # from the second one on nobody watches
            assert len(seen) == 4
        else:
            with pytest.raises(
                UserError, match=r"parameter embedding\.weight is used outside its own module"
            ):
                validate()
        assert model.embedding.weight.grad is None
        assert not model.embedding.weight._backward_hooks


@pytest.mark.parametrize("shape", [(5, 1, 8), (5, 4, 8), (8,)])
def test_a_layer_must_see_every_row(shape: tuple[int, ...]) -> None:
    """A broadcast input has one gradient for all rows: no row's value can be told from it."""
    weight = nn.Parameter(torch.ones(8))
    emission = Emission(Site("wpe", "bias", Sharding.REPLICATED, 1), Pass(), weight, torch.ones(shape))
    scorer = RowScorer(None, torch.zeros(3, 1))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"layer wpe sees tokens of shape .* but the microbatch has 3 rows"):
        scorer(emission)
