"""Loss tokens of a step's rows: those of a mask on the device come to the host with the step's other figures."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from inrun_megatron.host import to_host
from inrun_megatron.shapley import rows as rows_module
from inrun_megatron.shapley.rows import StepRows
from tests.counting import HostReads
from tests.distributed import assert_cases, run_cases
from tests.layout_engine import build_engine, share
from tests.layouts import LayoutCase

NOWHERE = torch.device("meta")  # any read of a tensor there raises
B, S = 3, 8


def _masks(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [(torch.rand(B, S, generator=generator) < 0.7).float() for _ in range(count)]


def test_a_mask_on_the_device_is_not_read() -> None:
    rows = StepRows(2, NOWHERE)
    first, second, third = _masks(3)
    sample = torch.arange(B)
    rows.add(torch.zeros(B), sample, first.to(NOWHERE))
    rows.add(torch.zeros(B), sample + B, second)  # on the host
    rows.add(torch.zeros(B), sample + 2 * B, third.sum(1).int().to(NOWHERE))
    waiting = rows.unread()
    assert waiting.device == NOWHERE and waiting.shape == (2 * B,)
    rows.read(np.concatenate([first.sum(1).numpy(), third.sum(1).numpy()]).astype(np.float64))
    assert {microbatch.tokens.dtype for microbatch in rows.microbatches} == {torch.int64}
    dataset, identities, tokens = rows.joined()
    assert identities.tolist() == list(range(3 * B)) and len(dataset) == 3 * B
    assert tokens.tolist() == torch.cat((first, second, third)).sum(1).tolist()
    assert len(rows.unread()) == 0


def test_a_mask_on_the_device_is_cut_there() -> None:
    (mask,) = _masks(1)
    parts = torch.arange(S).expand(B, S) // 3
    there = StepRows(2, NOWHERE)
    there.add(torch.zeros(B), torch.arange(B), mask.to(NOWHERE), parts)
    assert there.unread().shape == (3 * B,)  # of parts, unread
    rows = StepRows(2, torch.device("cpu"))
    rows.add(torch.zeros(B), torch.arange(B), mask, parts)
    assert len(rows.unread()) == 0
    assert rows.joined()[2].tolist() == [int(row[at : at + 3].sum()) for row in mask for at in (0, 3, 6)]


def test_on_the_host_nothing_is_left_to_read() -> None:
    rows = StepRows(2, torch.device("cpu"))
    masks = _masks(2)
    with HostReads() as reads:
        for mask in masks:
            rows.add([0] * B, list(range(B)), mask)
        assert rows.unread().shape == (0,)
    assert not reads.counts
    rows.read(np.empty(0))
    assert torch.equal(rows.joined()[2], torch.cat(masks).sum(1).long())


def test_large_counts_come_whole() -> None:
    counts = torch.tensor([2**31 + 1, 2**52 + 1, 0])
    read = to_host(counts=counts)["counts"]
    assert torch.equal(torch.from_numpy(read).long(), counts)


class _Ledger:
    """Keeps what a step appends."""

    writer = 0

    def __init__(self) -> None:
        self.tokens: list[np.ndarray[Any, Any]] = []

    def require(self, iteration: int, dataset: Any, sample: Any, cut: bool) -> None:
        pass

    def append(
        self, iteration: int, dataset: Any, sample: Any, tokens: Any, *rest: Any, **others: Any
    ) -> None:
        self.tokens.append(tokens)

    def append_step(self, record: Any) -> None:
        pass


def _step(rank: int, world: int, elsewhere: bool) -> tuple[list[Any], list[Any], list[Any], int, list[Any]]:
    """Tokens of a step in the ledger, of its masks and as they came from the device; reads, and values.

    A microbatch's dots are complete when its ``samples`` block ends: nothing of it waits for the end of the step. Where
    ``elsewhere``, its backward runs after the block, which the step's end makes up for.

    The masks are taken to be on a device where ``elsewhere``.
    """
    from inrun_megatron import InRunShapley, Layout, ShapleyTarget
    from inrun_megatron.models import token_losses

    case = LayoutCase(1, 1, False, 1, 2, "gpt2", "sgd", steps=1)
    engine = build_engine(case)
    layout, ledger = Layout.current(), _Ledger()
    expected: list[torch.Tensor] = []
    targets = [
        ShapleyTarget(t.name, share(t, layout, 2, pipeline=False), t.num_tokens) for t in case.targets()
    ]
    shapley = InRunShapley(engine, targets, token_losses, layout=layout, ledger=ledger)
    original, arrived, dots = rows_module._is_on_host, [], []
    place = StepRows.read

    def read(self: StepRows, tokens: Any) -> None:
        arrived.extend(tokens.tolist())
        place(self, tokens)

    StepRows.read = read  # type: ignore[method-assign]
    if elsewhere:  # all but the identities below
        rows_module._is_on_host = lambda tensor: tensor.dtype == torch.int32
    try:
        with HostReads() as reads, shapley.step(1) as step:
            for microbatch in case.batches()[0][0]:
                identity = (microbatch["dataset"].int(), microbatch["sample"].int())
                mask = microbatch["loss_mask"].clone()
                mask[0, : 1 + len(expected)] = 0
                expected.append(mask.sum(1).long())
                with step.samples(*identity, mask):
                    losses = token_losses(engine, microbatch)
                    if not elsewhere:
                        engine.backward((losses * mask).sum() / mask.sum())
                dots.append(step._rows.microbatches[-1].dots.clone())
                if elsewhere:
                    engine.backward((losses * mask).sum() / mask.sum())
                engine.step()
    finally:
        rows_module._is_on_host, StepRows.read = original, place  # type: ignore[method-assign]
    assert torch.equal(torch.cat(dots), step._rows.dots()) is not elsewhere
    (tokens,) = ledger.tokens
    assert tokens.dtype == np.int64 and step.result.scored
    assert step.result.values is not None
    values = step.result.values.tolist()
    return tokens.tolist(), torch.cat(expected).tolist(), arrived, sum(reads.counts.values()), values


def test_a_step_reads_them_with_its_other_figures() -> None:
    (here,), (there,) = assert_cases(run_cases(_step, 1, [False, True], timeout=300))
    assert here[0] == here[1] == there[0] == there[1]
    assert len(set(here[0])) > 1
    assert here[2] == [] and there[2] == there[1]
    assert here[3] == there[3] > 0
    assert here[4] == there[4]
