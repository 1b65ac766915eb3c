"""Taps of layers that tensor parallelism shards: which rank counts a layer, its sequence shards, its heads and biases."""

from __future__ import annotations

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
