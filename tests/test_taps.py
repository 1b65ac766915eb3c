"""Which rank of a tensor-parallel group counts a layer's dots."""

from __future__ import annotations

from collections import Counter

from inrun_megatron.taps.emission import Sharding, Site


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
