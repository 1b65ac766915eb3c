"""Sums of directions that travel while backwards still run: whole, in one order, early; and layers gathered ahead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn import Parameter

from inrun_megatron.engines.shards import FlatGroup, Residence, Span
from tests.counting import Collectives
from tests.distributed import DistributedError, run_distributed

SIZES = [
    (7, 3),
    (5,),
    (4, 6),
    (9,),
    (2, 2),
]  # of parameters, in the order of the forward; vectors are a group of their own


def _groups(residence: Residence, size: int, rank: int) -> tuple[list[FlatGroup], list[Parameter]]:
    weights = [Parameter(torch.zeros(shape)) for shape in SIZES]
    groups = []
    for dim in (1, 2):
        spans, start = [], 0
        for weight in weights:
            if weight.dim() == dim:
                spans.append(Span(weight, start, weight.numel()))
                start += weight.numel()
        numel = -(-start // size) * size
        own = (
            (rank * numel // size, (rank + 1) * numel // size) if residence is Residence.FLAT else (0, numel)
        )
        groups.append(FlatGroup(residence, numel, *own, spans, torch.device("cpu")))
    return groups, weights


def adding(value: torch.Tensor) -> Callable[[torch.Tensor, bool], Any]:
    """What ``Directions.accumulate`` is given."""
    return lambda out, fresh: out.copy_(value) if fresh else out.add_(value)


def publish_sums(directions: Any) -> None:
    """What layers read are the sums as they are."""
    leaving = directions.leaving()
    for shard, out in zip(directions.shards(), leaving, strict=True):
        if out is not None:
            out.copy_(shard)
    directions.publish(leaving)


def _sums(rank: int, world: int, residence: Residence, size: int) -> list[Any]:
    """Three steps of two targets, whose last weight is used twice: (collectives at the end of each backward, whether all
    shards and what layers read is right, buckets waited for after each read) per step."""
    from inrun_megatron.directions import Directions
    from inrun_megatron.engines import buckets
    from inrun_megatron.parallel import Layout

    buckets.BUCKET_SIZE = size
    groups, weights = _groups(residence, world, rank)
    directions = Directions(groups, {}, Layout.data_parallel(), 2)
    uses = [
        *reversed(weights),
        weights[0],
    ]  # the first weight is read again at the very end, as tied embeddings are
    found = []
    for step in range(3):
        directions.zero()
        running = []
        expected = {id(w): torch.zeros(2, w.numel()) for w in weights}
        for k in range(2):
            for last in (False, True):
                for i, weight in enumerate(uses):
                    each = (
                        torch.arange(weight.numel(), dtype=torch.float32).view(weight.shape)
                        + i
                        + 10 * k
                        + step
                    )
                    directions.accumulate(k, weight, adding(each * (rank + 1)), last=last)
                    expected[id(weight)][k] += each.flatten() * sum(range(1, world + 1))
            running.append(directions._reductions.started)
        directions.reduce()
        right = True
        for group, shard in zip(groups, directions.shards(), strict=True):
            whole = torch.zeros(2, group.numel)
            for span in group.spans:
                whole[:, span.start : span.start + span.numel] = expected[id(span.parameter)]
            right &= torch.equal(shard, whole[:, group.start : group.stop])
        publish_sums(directions)
        coming = directions._flat.running
        waiting = []
        for weight in uses:
            for row, whole in zip(directions.of(weight), expected[id(weight)], strict=True):
                right &= torch.equal(row.flatten(), whole)
            waiting.append(coming - directions._flat.running)
        found.append((running, right, waiting))
    return found


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("residence", [Residence.REPLICATED, Residence.FLAT])
def test_sums_are_whole_and_on_their_way_early(world: int, residence: Residence) -> None:
    """From the second step on every bucket is sent before the target's backward ends, whatever their length."""
    padded = [-(-numel // world) * world for numel in (7 * 3 + 4 * 6 + 2 * 2, 5 + 9)]
    for size, count in ((8, sum(-(-numel // 8) for numel in padded)), (1000, 2)):
        for first, *later in run_distributed(_sums, world, residence, size):
            assert first[:2] == ([0, 0], True), "uses are not known yet"
            assert [own[:2] for own in later] == [([count, 2 * count], True)] * 2
            for *_, waiting in (first, *later):
                if residence is Residence.REPLICATED:
                    assert set(waiting) == {0}
                elif size == 8:  # a layer waits for its own buckets, not for those before it
                    assert 0 < waiting[0] < waiting[2] < waiting[4] == count


def _used_more_often(rank: int, world: int) -> None:
    from inrun_megatron.directions import Directions
    from inrun_megatron.parallel import Layout

    groups, weights = _groups(Residence.FLAT, world, rank)
    directions = Directions(groups, {}, Layout.data_parallel(), 1)
    for uses in (1, 2):
        directions.zero()
        for weight in weights * uses:
            directions.accumulate(0, weight, adding(torch.ones_like(weight)), last=True)
        directions.reduce()


def _untouched(rank: int, world: int, stored: torch.dtype) -> list[list[float]]:
    """A step that adds to one of two weights only, after one that added to both; buffers hold NaN until written."""
    from inrun_megatron.directions import Directions
    from inrun_megatron.parallel import Layout

    groups, weights = _groups(Residence.FLAT, world, rank)
    empty = Directions._empty
    Directions._empty = lambda *args: empty(*args).fill_(float("nan"))  # type: ignore[method-assign]
    try:
        directions = Directions(groups, {}, Layout.data_parallel(), 1, stored=stored)
        for touched in (weights, weights[:1]):
            directions.zero()
            for weight in touched:
                directions.accumulate(0, weight, adding(torch.ones_like(weight)))
            directions.reduce()
        return [shard.flatten().tolist() for shard in directions.shards()]
    finally:
        Directions._empty = empty  # type: ignore[method-assign]


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_what_nothing_was_added_to_is_zero(stored: torch.dtype) -> None:
    """Sums are written, not added to what was there; what nobody writes, padding too, is zero."""
    own = run_distributed(_untouched, 2, stored)
    matrices = [value for shards in own for value in shards[1]]
    assert matrices.count(2.0) == 7 * 3 and matrices.count(0.0) == len(matrices) - 7 * 3
    assert {value for shards in own for value in shards[0]} == {0.0}


def _used_by_some(rank: int, world: int, residence: Residence) -> list[bool]:
    """Whether sums are right in three steps in which rank 1, and everywhere the first target, passes some weights by."""
    from inrun_megatron.directions import Directions
    from inrun_megatron.parallel import Layout

    groups, weights = _groups(residence, world, rank)
    directions = Directions(groups, {}, Layout.data_parallel(), 2)
    passed_by = {
        (0, 0): weights[1:2],
        (0, 1): weights[1:3],
        (1, 0): [],
        (1, 1): weights[3:],
    }  # (target, rank)

    def users(target: int, weight: Parameter) -> int:
        return sum(all(weight is not left for left in passed_by[target, r]) for r in range(world))

    right = []
    for _ in range(3):
        directions.zero()
        for k in range(2):
            for weight in reversed(weights):
                if all(weight is not left for left in passed_by[k, rank]):
                    directions.accumulate(k, weight, adding(torch.ones_like(weight)), last=True)
        directions.reduce()
        publish_sums(directions)
        found = [[set(row.flatten().tolist()) for row in directions.of(weight)] for weight in weights]
        right.append(found == [[{float(users(k, weight))} for k in range(2)] for weight in weights])
    return right


@pytest.mark.parametrize("residence", [Residence.REPLICATED, Residence.FLAT])
def test_layers_that_some_ranks_or_targets_pass_by(residence: Residence) -> None:
    """What lay in the sums of an unused layer must not be sent, where the other ranks use it."""
    assert run_distributed(_used_by_some, 2, residence) == [[True] * 3] * 2


def test_a_use_that_comes_too_late_is_an_error() -> None:
    with pytest.raises(
        DistributedError, match=r"shape \(7, 3\) is used 2 times in the last microbatch of a pass, 1 times"
    ):
        run_distributed(_used_more_often, 2)


def _read(rank: int, world: int) -> list[Any]:
    """Gathers of five passes, the last two in another order: (on the way while a layer is at hand, calls, right)."""
    from inrun_megatron.directions.gathers import LayerGathers

    parts = {key: torch.full((3,), 10.0 * key + rank) for key in range(4)}
    gathers = LayerGathers(dist.group.WORLD, world, lambda key: parts[key])
    found = []
    for order in [[3, 2, 1, 3, 0]] * 3 + [[0, 2, 1]] * 2:
        counted = Collectives()
        ahead, right = [], True
        with counted:
            gathers.rewind()
            for key in order:
                whole = gathers.read(key)
                right &= whole.view(world, 3)[:, 0].tolist() == [10.0 * key + r for r in range(world)]
                ahead.append(None if gathers._coming is None else gathers._coming.key)
        found.append((ahead, sum(counted.counts.values()), right))
    return found


def test_layers_are_gathered_ahead() -> None:
    for found in run_distributed(_read, 2):
        nothing = [None] * 5
        assert found[0] == (nothing, 5, True)
        assert found[1] == found[2] == ([2, 1, 3, 0, None], 5, True)
        assert found[3] == ([None] * 3, 3, True)  # what had been learned is dropped where the order changes
        assert found[4] == ([2, 1, None], 3, True)
