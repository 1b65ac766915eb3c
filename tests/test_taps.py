"""Taps: which rank counts a layer, and what a tap must not change or leave out."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from inrun_megatron.dots.segments import Segments
from inrun_megatron.errors import UserError
from inrun_megatron.shapley.consumers import RowScorer
from inrun_megatron.taps import Emission, Pass, attach_taps
from inrun_megatron.taps.emission import Sharding, Site
from tests.counting import standing_in
from tests.distributed import Workers


def _sites(tp_rank: int, tp_size: int, sharding: Sharding) -> list[Site]:
    names = [
        f"decoder.layers.{i}.{part}" for i in range(24) for part in ("input_layernorm", "mlp.linear_fc2")
    ]
    return [Site(name, "norm", sharding, 1, tp_rank, tp_size) for name in names]


def test_a_replicated_layer_counts_on_one_rank_and_ranks_share_them() -> None:
    for tp in (1, 2, 4, 8):
        by_rank = [[s.name for s in _sites(r, tp, Sharding.REPLICATED) if s.counts_here] for r in range(tp)]
        counted = Counter(name for names in by_rank for name in names)
        assert counted == Counter(s.name for s in _sites(0, tp, Sharding.REPLICATED))
        # 48 layers: nobody has more than twice its share.
        assert max(map(len, by_rank)) <= 2 * 48 / tp


def test_shards_count_on_every_rank() -> None:
    for sharding in set(Sharding) - {Sharding.REPLICATED}:
        assert all(site.counts_here for rank in range(4) for site in _sites(rank, 4, sharding))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [nn.RMSNorm, nn.LayerNorm, lambda h: nn.RMSNorm(h, eps=1e-3)])
def test_a_tapped_norm_is_the_plain_one(make: type[nn.Module], dtype: torch.dtype) -> None:
    """torch's own epsilons, too: RMSNorm's default is that of the type it computes in, whatever the weights'."""
    norm = make(16).to(dtype)
    x = (0.02 * torch.randn(4, 3, 16)).to(dtype)
    plain = norm(x)
    attach_taps(norm)
    torch.testing.assert_close(norm(x), plain, rtol=2 * torch.finfo(dtype).eps, atol=0.0)


class _Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


class _Named(nn.Linear):
    pass


def test_a_forward_of_its_own_is_not_replaced() -> None:
    with pytest.raises(UserError, match="layer 1 is a _Scaled, which overrides the forward of Linear"):
        attach_taps(nn.Sequential(nn.Linear(4, 4), _Scaled(4, 4)))
    assert attach_taps(nn.Sequential(_Named(4, 4))).coverage().tapped == 2
    frozen = _Scaled(4, 4).requires_grad_(False)
    x = torch.randn(2, 4)
    plain = frozen(x)
    attach_taps(nn.Sequential(nn.Linear(4, 4), frozen))
    assert torch.equal(frozen(x), plain)


def _layers() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.RMSNorm(4), nn.Linear(4, 4))


def test_a_forward_of_an_instances_own_is_not_replaced() -> None:
    """Neither somebody's wrapper nor the taps of another InRunShapley; and the refusal leaves no tap behind."""
    model = _layers()
    model[3].forward = lambda x: 3.0 * F.linear(x, model[3].weight)  # type: ignore[method-assign]
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
    model[2].forward = lambda x: x  # type: ignore[method-assign]
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
        model, seen = _Tied(through_module), []
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


def _column_with_a_frozen_bias(rank: int, world: int) -> list[Tensor]:
    """Output and weight gradient of a column-parallel layer, plain and tapped."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear
    from megatron.core.transformer import TransformerConfig

    from inrun_megatron.models import cpu

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(world)
    cpu.install()
    sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "tensor_model_parallel_size": world}
    config = TransformerConfig(**sizes, use_cpu_initialization=True)
    layer = ColumnParallelLinear(
        8, 12, config=config, init_method=nn.init.normal_, bias=True, gather_output=False
    )
    nn.init.normal_(layer.bias.requires_grad_(False))
    x = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(1))

    def run() -> list[Tensor]:
        layer.zero_grad()
        output, _ = layer(x)
        output.square().sum().backward()
        return [output.detach(), layer.weight.grad.clone()]

    plain = run()
    taps = attach_taps(layer)
    assert taps.coverage().parameters == 1
    return [*plain, *run()]


def test_a_frozen_bias_of_a_column_parallel_layer_is_added(two_ranks: Workers) -> None:
    for output, gradient, tapped_output, tapped_gradient in two_ranks.run(_column_with_a_frozen_bias):
        assert torch.equal(tapped_output, output) and torch.equal(tapped_gradient, gradient)


class _AsNCCL:
    """Stands where a module has `torch.distributed`: NCCL takes memory as it lies, where gloo copies to and from strides."""

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def reduce_scatter_tensor(self, output: Tensor, given: Tensor, **options: Any) -> Any:
        assert output.is_contiguous() and given.is_contiguous()
        return dist.reduce_scatter_tensor(output, given, **options)


def _transposed_shards(rank: int, world: int) -> bool:
    from inrun_megatron.taps.linear import LinearCall, linear

    weight = nn.Parameter(torch.randn(6, 5, generator=torch.Generator().manual_seed(0)))
    site = Site("proj", "linear", Sharding.COLUMN, 1, rank, world)
    call = LinearCall(site, None, weight, group=dist.group.WORLD, sequence_parallel=True)
    by_row = torch.randn(3, 4, 5).requires_grad_()  # [b, s/tp, in]
    with standing_in(_AsNCCL(), ["taps.linear"]):
        linear(by_row.transpose(0, 1), call).sum().backward()
    assert by_row.grad is not None
    return torch.allclose(by_row.grad, world * weight.sum(0).expand_as(by_row))


def test_sequence_shards_may_lie_in_any_order(two_ranks: Workers) -> None:
    assert two_ranks.run(_transposed_shards) == [True, True]


def _megatron_attention(rank: int, world: int) -> tuple[str, set[Sharding], str]:
    """What is said of norms of heads and of a fused gated bias."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.spec_utils import build_module

    from inrun_megatron.models import cpu
    from inrun_megatron.models.attention import SdpaCoreAttention

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(world)
    cpu.install()
    sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "tensor_model_parallel_size": world}
    gated = {"gated_linear_unit": True, "activation_func": F.silu, "bias_activation_fusion": True}
    config = TransformerConfig(**sizes, **gated, use_cpu_initialization=True, qk_layernorm=True)
    spec = get_gpt_layer_local_spec(qk_layernorm=True)
    spec.submodules.self_attention.submodules.core_attention = SdpaCoreAttention
    layer = build_module(spec, config=config, layer_number=1)
    attention = layer.self_attention
    with pytest.raises(UserError) as heads:
        attach_taps(attention)
    for norm in (attention.q_layernorm, attention.k_layernorm):
        for parameter in norm.parameters():
            parameter.sequence_parallel = True
    taps = attach_taps(attention)
    shardings = {taps.sharding[id(p)] for p in attention.q_layernorm.parameters()}
    with pytest.raises(UserError) as fused:
        attach_taps(layer.mlp)
    return str(heads.value), shardings, str(fused.value)


def test_megatron_layers_that_taps_see_a_part_of(two_ranks: Workers) -> None:
    for heads, shardings, fused in two_ranks.run(_megatron_attention):
        assert heads.startswith("norm q_layernorm sees the heads of its tensor-parallel rank only")
        assert shardings == {Sharding.SEQUENCE}
        assert fused.startswith("layer linear_fc1 has a bias that a fused gated activation adds")


class _Given:
    """Directions as they are given."""

    def __init__(self, directions: Tensor) -> None:
        self.directions = directions

    def of(self, parameter: nn.Parameter) -> list[Tensor]:
        return list(self.directions)


@pytest.mark.parametrize("parts", [2, 12], ids=["long", "tokens"])
def test_parts_of_a_plain_linear_that_sees_a_sequence_shard(parts: int) -> None:
    """The shards' dots add up to those of whole rows: a part's positions count in the row, not in the shard."""
    s, b, tp = 12, 3, 2
    generator = torch.Generator().manual_seed(1)
    a, g = (torch.randn(s, b, width, generator=generator, dtype=torch.float64) for width in (8, 6))
    weight = nn.Parameter(torch.zeros(6, 8, dtype=torch.float64))
    given = _Given(torch.randn(2, 6, 8, generator=generator, dtype=torch.float64))
    segments = Segments.of((torch.arange(s) * parts // s).expand(b, s))

    def dots(sharding: Sharding, rank: int, part: slice) -> Tensor:
        found = torch.zeros(len(segments), 2, dtype=torch.float64)
        scorer = RowScorer(given, found, segments)  # type: ignore[arg-type]
        emission = Emission(Site("proj", "linear", sharding, 1, rank, tp), Pass(), weight, g[part], a[part])
        scorer(emission)
        scorer.flush()
        return found

    whole = dots(Sharding.COLUMN, 0, slice(None))
    shards = [dots(Sharding.SEQUENCE, rank, slice(6 * rank, 6 * rank + 6)) for rank in range(tp)]
    torch.testing.assert_close(sum(shards), whole)
