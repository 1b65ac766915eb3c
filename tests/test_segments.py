"""Parts of samples: how they are cut, and their dots against loops in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from inrun_megatron.dots import linear
from inrun_megatron.dots.elementwise import token_embedding_dots, token_vector_dots
from inrun_megatron.dots.late import LateDots
from inrun_megatron.dots.linear import weight_gradient_and_dots
from inrun_megatron.dots.products import weight_gradient
from inrun_megatron.dots.segments import Segments
from inrun_megatron.errors import UserError
from inrun_megatron.shapley.rows import StepRows

S, IN, OUT, TARGETS = 12, 10, 16, 2
PARTS = torch.tensor(
    [[0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 2, 3], [0] * 12, [5, 5, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4], list(range(12))]
)
BOUNDS = [
    (0, 0, 3),
    (0, 3, 10),
    (0, 10, 11),
    (0, 11, 12),
    (1, 0, 12),
    (2, 0, 2),
    (2, 2, 12),
    *((3, t, t + 1) for t in range(12)),
]


def test_rows_are_cut_where_neighbours_differ() -> None:
    cut = Segments.of(PARTS)
    assert list(cut.bounds) == BOUNDS and len(cut) == len(BOUNDS)
    assert cut.row.tolist() == [row for row, _, _ in BOUNDS]
    assert cut.ordinal.tolist() == [0, 1, 2, 3, 0, 0, 1, *range(12)]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("batch_dim", [0, 1])
def test_sums_of_the_shards_are_those_of_the_rows(size: int, batch_dim: int) -> None:
    """A document that a shard's edge cuts is summed from both sides; one outside the shard gets nothing."""
    cut = Segments.of(PARTS)
    tokens = torch.randn(4, S, 3, dtype=torch.float64)
    expected = torch.stack([tokens[row, begin:end].sum(0) for row, begin, end in BOUNDS])
    shards = [shard.movedim(0, batch_dim) for shard in tokens.chunk(size, dim=1)]
    found = [cut.sums(shard, batch_dim, rank, size) for rank, shard in enumerate(shards)]
    torch.testing.assert_close(torch.stack(found).sum(0), expected, rtol=1e-12, atol=1e-12)
    if size > 1:
        assert (found[-1][0] == 0).all()


def test_sums_are_taken_of_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a matrix torch's GPU kernel lets one thread walk through a whole part; of single tokens there is nothing to add."""
    given: list[int] = []
    reduce = torch.segment_reduce

    def noted(data: Tensor, *arguments: object, **options: object) -> Tensor:
        given.append(data.dim())
        return reduce(data, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch, "segment_reduce", noted)
    tokens = torch.randn(4, S, 3, dtype=torch.float64)
    assert Segments.of(PARTS).sums(tokens).shape == (len(BOUNDS), 3) and given == [1, 1, 1]
    single = Segments.of(torch.arange(S).repeat(4, 1))
    assert torch.equal(single.sums(tokens), tokens.view(4 * S, 3)) and given == [1, 1, 1]
    pairs = Segments.of(
        torch.arange(S // 2).repeat_interleave(2).repeat(4, 1)
    )  # as many as a half has positions
    half = tokens[:, : S // 2]
    first = pairs.sums(half, 0, 0, 2).view(4, S // 2, 3)
    torch.testing.assert_close(first[:, : S // 4], half[:, ::2] + half[:, 1::2])


def _reference(a: Tensor, b: Tensor, directions: list[Tensor], batch_dim: int) -> Tensor:
    a, b = a.double().movedim(batch_dim, 0), b.double().movedim(batch_dim, 0)
    blocks = [b[row, begin:end].t() @ a[row, begin:end] for row, begin, end in BOUNDS]
    return torch.stack([torch.stack([(w * d.double()).sum() for d in directions]) for w in blocks])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch_dim", [0, 1])
@pytest.mark.parametrize("form", ["blocks", "projection"])
@pytest.mark.parametrize("widths", [(IN, OUT), (OUT, IN)], ids=["wide", "narrow"])
def test_linear(
    widths: tuple[int, int],
    form: str,
    batch_dim: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linear, "_form", lambda *shape: form)  # whatever the rule says of so small a shape
    generator = torch.Generator().manual_seed(3)
    size = (S, 4) if batch_dim == 1 else (4, S)
    a = torch.randn(*size, widths[0], generator=generator, dtype=torch.float64).to(dtype)
    b = torch.randn(*size, widths[1], generator=generator, dtype=torch.float64).to(dtype)
    storage = torch.float64 if dtype == torch.float64 else torch.float32
    directions = [
        torch.randn(widths[1], widths[0], generator=generator, dtype=storage) for _ in range(TARGETS)
    ]
    expected = _reference(a, b, directions, batch_dim)
    start = torch.randn(len(BOUNDS), TARGETS, dtype=torch.float64)
    dots = start.clone()
    late = LateDots(dots)
    grad = weight_gradient_and_dots(a, b, directions, batch_dim, late, Segments.of(PARTS))
    late.flush()
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    assert (dots - start - expected).abs().max() <= tolerance * expected.abs().max()
    if form == "projection":
        assert torch.equal(grad, weight_gradient(a, b))  # bitwise as without scoring
    else:
        exact = weight_gradient(a.double(), b.double())
        bound = 8e-3 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(grad.double(), exact, rtol=bound, atol=bound)


def test_vectors_and_embeddings() -> None:
    cut, generator = Segments.of(PARTS), torch.Generator().manual_seed(4)
    b = torch.randn(4, S, OUT, generator=generator)
    vectors = [torch.randn(OUT, generator=generator) for _ in range(TARGETS)]
    table = [torch.randn(9, OUT, generator=generator) for _ in range(TARGETS)]
    ids = torch.randint(9, (4, S), generator=generator)
    by_vector = cut.sums(token_vector_dots(b, vectors))
    by_table = cut.sums(token_embedding_dots(b, ids, table))
    for j, (row, begin, end) in enumerate(BOUNDS):
        for k in range(TARGETS):
            own = b[row, begin:end].double()
            assert abs(by_vector[j, k] - (own * vectors[k].double()).sum()) < 1e-4
            assert abs(by_table[j, k] - (own * table[k][ids[row, begin:end]].double()).sum()) < 1e-4


def test_rows_of_a_step() -> None:
    """Two microbatches, one of them cut: identities, loss tokens and sums."""
    rows = StepRows(TARGETS, torch.device("cpu"))
    mask = torch.ones(4, S)
    mask[0, :4] = 0
    rows.add(torch.zeros(4), torch.arange(4), mask, PARTS)
    rows.add(torch.ones(1), torch.tensor([9]), torch.tensor([7]))
    dataset, sample, tokens = rows.joined()
    assert dataset.tolist() == [0.0] * len(BOUNDS) + [1.0]
    assert sample.tolist() == [row for row, _, _ in BOUNDS] + [9]
    assert tokens.tolist() == [0, 6, 1, 1, 12, 2, 10] + [1] * 12 + [7]
    place, ordinal = rows.places()
    assert place.tolist() == [row for row, _, _ in BOUNDS] + [4] and ordinal[-1] == 0
    parts = torch.randn(len(place), TARGETS, dtype=torch.float64)
    values = rows.of_samples(parts)
    for i in range(5):
        torch.testing.assert_close(values[i], parts[place == i].sum(0), rtol=1e-15, atol=1e-15)
    with pytest.raises(UserError, match=r"tokens of shape \[4\] for 4 samples.*\[4, 12\]"):
        rows.add(torch.zeros(4), torch.arange(4), torch.ones(4), PARTS)
    with pytest.raises(UserError, match="3 samples"):
        rows.add(torch.zeros(3), torch.arange(3), mask, PARTS)


@pytest.mark.parametrize("size", [1, 3])
def test_bounds_within_sequence_shards_hold_the_lengths(size: int) -> None:
    segments = Segments.of(torch.tensor([[0, 0, 1, 1, 1, 2], [5, 5, 5, 5, 5, 5]]))
    for rank in range(size):
        bounds = segments.shard_bounds(rank, size)
        assert [row for row, _, _ in bounds] == segments.row.tolist()
        lengths = segments.lengths(torch.device("cpu"), rank, size)
        assert [end - begin for _, begin, end in bounds] == lengths.tolist()
