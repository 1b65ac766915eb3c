"""Taps: which rank counts a layer, and what a tap must not change or leave out."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inrun_megatron.dots.segments import Segments
from inrun_megatron.errors import UserError
from inrun_megatron.scoring import RowScorer
from inrun_megatron.taps import Emission, Pass, attach_taps
from inrun_megatron.taps.emission import Sharding, Site
from tests.distributed import run_distributed


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


def test_a_frozen_bias_of_a_column_parallel_layer_is_added() -> None:
    for output, gradient, tapped_output, tapped_gradient in run_distributed(_column_with_a_frozen_bias, 2):
        assert torch.equal(tapped_output, output) and torch.equal(tapped_gradient, gradient)


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
        scorer.settle()
        return found

    whole = dots(Sharding.COLUMN, 0, slice(None))
    shards = [dots(Sharding.SEQUENCE, rank, slice(6 * rank, 6 * rank + 6)) for rank in range(tp)]
    torch.testing.assert_close(sum(shards), whole)
