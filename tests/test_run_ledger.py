"""The ledger of a loop of one's own on several ranks: commits, resumes, and errors that all ranks raise."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from inrun_megatron.errors import UserError
from inrun_megatron.ledger import Ledger
from inrun_megatron.parallel import Layout
from tests.distributed import DistributedError, Workers, assert_cases, run_cases
from tests.layout_engine import build_engine, forward_backward, share
from tests.layouts import LayoutCase

DATA = LayoutCase(2, 1, False, 1, 2, "gpt2", steps=6)
TENSOR = LayoutCase(2, 2, True, 0, 2, "llama", steps=6)
STAGES = LayoutCase(2, 1, False, 1, 2, "gpt2", steps=6, pp=2)


@dataclass(frozen=True)
class Part:
    """A start: steps, commits after some of them, and how it ends."""

    layout: LayoutCase
    directory: str
    steps: tuple[int, ...] = (1, 2, 3, 4, 5)
    commits: tuple[int, ...] = (2, 4)
    resume: Mapping[str, Any] | None = None
    dies: bool = False  # with rows that no commit names
    granularity: str = "sample"
    interval: int = 1
    cut: bool = False  # samples into tokens


class Died(Exception):
    """The loop's own."""


def _train(rank: int, world: int, part: Part) -> dict[str, Any]:
    """State after the last commit; a function for `run_cases`."""
    from inrun_megatron import InRunShapley, PipelineShapley, RunLedger, ShapleyTarget
    from inrun_megatron.models import token_losses

    case = part.layout
    engine = build_engine(case)
    layout = Layout.current()
    pipeline = case.pp > 1
    targets = [
        ShapleyTarget(t.name, share(t, layout, case.micro_batch, pipeline=pipeline), t.num_tokens)
        for t in case.targets()
    ]
    if pipeline:
        shapley: Any = PipelineShapley(engine, targets, engine.module.loss_fn, layout=layout)
    else:
        shapley = InRunShapley(engine, targets, token_losses, layout=layout, interval=part.interval)
    batches = dict(enumerate(case.batches(), start=1))
    state: dict[str, Any] = {}
    said = io.StringIO()
    try:
        with (
            contextlib.redirect_stderr(said),
            RunLedger(
                shapley, part.directory, ["synthetic"], granularity=part.granularity, resume=part.resume
            ) as ledger,
        ):
            for iteration in part.steps:
                microbatches = batches[iteration][layout.dp_rank]
                with shapley.step(iteration) as step:
                    if pipeline:
                        step.train_batch(microbatches)
                    for m in () if pipeline else microbatches:
                        cut = torch.arange(m["tokens"].shape[1]).expand_as(m["tokens"]) if part.cut else None
                        with step.samples(m["dataset"], m["sample"], m["loss_mask"], cut):
                            forward_backward(engine, m)
                assert step.result.scored == (iteration % part.interval == 0), step.result.status
                if iteration in part.commits:
                    state = ledger.commit(None if part.interval > 1 else f"iter_{iteration}")
            if part.dies:
                raise Died
    except Died:
        assert shapley.ledger is None
        return {**state, "said": said.getvalue()}
    return ledger._state.to_dict()  # of the commit of close()


def _require_whole(directory: Path, steps: int, rows: int) -> None:
    ledger = Ledger(directory)
    assert [check.name for check in ledger.verify() if not check.ok] == []
    found = ledger.values().to_table()
    assert sorted(set(found["step"].to_pylist())) == list(range(1, steps + 1))
    assert len(found) == steps * rows * 2  # two targets
    assert ledger.run["configuration"]["shapley"]["estimator"] == "first_order"
    assert ledger.run["coverage"]["tapped"] == ledger.run["coverage"]["parameters"] > 0


def test_every_layout_keeps_its_values(tmp_path: Path) -> None:
    """What no commit named when the loop ended is committed as it closes."""
    cases = [Part(layout, str(tmp_path / str(i))) for i, layout in enumerate((DATA, TENSOR, STAGES))]
    for part, states in zip(cases, assert_cases(run_cases(_train, 2, cases, timeout=300)), strict=True):
        assert [state["step"] for state in states] == [5, 5] and states[0] == states[1]
        layout = part.layout
        _require_whole(Path(part.directory), 5, layout.dp * layout.accumulation * layout.micro_batch)
        commits = sorted(path.name for path in (Path(part.directory) / "shapley/commits").iterdir())
        assert commits == [f"{step:010}.json" for step in (2, 4, 5)]


def test_a_loop_that_died_goes_on_from_its_checkpoint(two_ranks: Workers, tmp_path: Path) -> None:
    state, other = two_ranks.run(_train, Part(DATA, str(tmp_path), dies=True), timeout=300)
    assert "after step 4, up to step 5, is in no commit and is lost" in state.pop("said")
    assert "is lost" not in other.pop("said")
    assert state == other and (state["run_id"], state["step"]) == (Ledger(tmp_path).run_id, 4)
    assert Ledger(tmp_path).last_step == 4
    rest = Part(DATA, str(tmp_path), (5, 6), (), state)
    assert [own["step"] for own in two_ranks.run(_train, rest, timeout=300)] == [6, 6]
    _require_whole(tmp_path, 6, 8)
    # From an earlier checkpoint: what was committed later is taken back.
    early = {**state, "step": 2, "commit": _identity(tmp_path, 2)}
    two_ranks.run(_train, Part(DATA, str(tmp_path), (3, 4), (4,), early), timeout=300)
    _require_whole(tmp_path, 4, 8)
    # The commit of step 4 is another one now.
    with pytest.raises(DistributedError, match="is not the one that the checkpoint follows"):
        two_ranks.run(_train, rest, timeout=300)
    _require_whole(tmp_path, 4, 8)


def _identity(directory: Path, step: int) -> str:
    """What a state of that commit carries."""
    return str(json.loads((directory / f"shapley/commits/{step:010}.json").read_text())["identity"])


def _refused(two_ranks: Workers, part: Part) -> str:
    with pytest.raises(DistributedError) as error:
        two_ranks.run(_train, part, timeout=300)
    assert error.value.alive  # no rank waits for another
    return str(error.value)


def test_what_is_refused_is_refused_by_all_ranks(two_ranks: Workers, tmp_path: Path) -> None:
    part = Part(DATA, str(tmp_path), (1, 2), ())
    [state, _] = two_ranks.run(_train, part, timeout=300)
    assert "AgreedError" in _refused(two_ranks, part)
    assert "holds a ledger, up to step 2: give resume=" in _refused(two_ranks, part)
    other = Part(DATA, str(tmp_path), resume={**state, "run_id": "another"})
    assert "belongs to that of run another" in _refused(two_ranks, other)
    later = Part(DATA, str(tmp_path), resume={**state, "step": 9})
    assert "has no commit of step 9, which the checkpoint follows, and ends at step 2" in _refused(
        two_ranks, later
    )
    assert "holds no ledger" in _refused(two_ranks, Part(DATA, str(tmp_path / "none"), resume=state))
    for unlike in ({"ledger": state}, {**state, "step": "2"}, {**state, "step": -1}):
        assert "is not what commit() returned" in _refused(
            two_ranks, Part(DATA, str(tmp_path), resume=unlike)
        )
    # Numbered from 1 again; numbers left out; and parts of samples in a ledger of whole ones.
    for number in (1, 4):
        assert f"step {number} comes after step 2" in _refused(
            two_ranks, Part(DATA, str(tmp_path), (number,), (), state)
        )
    assert "granularity" in _refused(two_ranks, Part(DATA, str(tmp_path / "cut"), (1,), (), cut=True))
    parts = Part(DATA, str(tmp_path / "parts"), (1,), (), granularity="token")
    assert "come without segments=" in _refused(two_ranks, parts)
    assert "none of sample, document, token" in _refused(
        two_ranks, Part(DATA, str(tmp_path / "new"), granularity="row")
    )
    _require_whole(tmp_path, 2, 8)


def test_a_commit_after_steps_that_are_not_scored(two_ranks: Workers, tmp_path: Path) -> None:
    part = Part(DATA, str(tmp_path), (1, 2, 3), (2, 3), interval=2)
    [state, _] = two_ranks.run(_train, part, timeout=300)
    assert state["step"] == 3
    [state, _] = two_ranks.run(_train, Part(DATA, str(tmp_path), (4, 5), (), state, interval=2), timeout=300)
    ledger = Ledger(tmp_path)
    assert state["step"] == 5 and all(check.ok for check in ledger.verify())
    assert sorted(set(ledger.values().to_table()["step"].to_pylist())) == [2, 4]


def _misuses(rank: int, world: int, directory: str) -> list[str]:
    """What the wrong uses of one rank or of both say, on this rank."""
    from inrun_megatron import InRunShapley, RunLedger, ShapleyTarget
    from inrun_megatron.errors import UserError
    from inrun_megatron.models import token_losses

    engine = build_engine(DATA)
    layout = Layout.current()
    given = [ShapleyTarget(t.name, share(t, layout, 2, pipeline=False), t.num_tokens) for t in DATA.targets()]
    shapley = InRunShapley(engine, given, token_losses)
    batches = [batch[layout.dp_rank] for batch in DATA.batches()]
    said: list[str] = []

    def train(number: int, *, dataset: int = 0, inside: Any = None, breaks: bool = False) -> None:
        with shapley.step(number) as step:
            if breaks:
                raise Died
            if inside is not None:
                inside()
            for m in batches[number - 1]:
                with step.samples(m["dataset"] + dataset, m["sample"], m["loss_mask"]):
                    forward_backward(engine, m)

    def refused(call: Any) -> None:
        with pytest.raises(UserError) as error:
            call()
        said.append(str(error.value))

    resumes = [None, {"run_id": "a", "step": 0, "commit": None}]
    refused(lambda: RunLedger(shapley, directory, ["synthetic"], resume=resumes[rank]))
    refused(lambda: RunLedger(shapley, directory, ["synthetic"], granularity=("sample", "row")[rank]))
    refused(lambda: RunLedger(shapley, directory, [("a", "b")[rank]]))
    # Steps that no ledger knows: the numbers of the next one are its own, and it begins between two steps.
    refused(lambda: train(5, inside=lambda: RunLedger(shapley, directory, ["synthetic"])))
    ledger = RunLedger(shapley, directory, ["synthetic"])
    assert ledger.commit()["step"] == 0
    refused(lambda: train(0))
    train(1)
    refused(lambda: train(1))
    refused(lambda: train(3))
    refused(lambda: train(2, inside=ledger.commit))
    refused(lambda: train(2, inside=ledger.close))
    # What failed may come again, and what is committed meanwhile is what was finished.
    with contextlib.suppress(Died):
        train(2, breaks=True)
    assert ledger.commit()["step"] == 1
    train(2)
    state = ledger.commit()
    assert state["step"] == 2
    refused(lambda: train(3, dataset=rank))
    # The optimizer has taken it: it has no place any more.
    refused(lambda: train(3))
    refused(ledger.commit)
    # Another InRunShapley is none that the ledger keeps, and it says so.
    shapley.close()
    refused(ledger.commit)
    shapley = InRunShapley(engine, given, token_losses)
    train(3)
    refused(ledger.close)
    ledger.close()
    refused(ledger.commit)
    return said


def test_misuse_of_one_rank_is_told_by_all_and_loses_nothing(two_ranks: Workers, tmp_path: Path) -> None:
    expected = [
        "resume is None on rank 0 and ResumeState(",
        "granularity 'row' is none of",
        "granularity and datasets are",
        "step 5 is not finished: open a ledger before a step",
        "step 0: steps are numbered from 1",
        "step 1 comes after step 1",
        "step 3 comes after step 1",
        "step 2 is not finished: commit or close after",
        "step 2 is not finished: commit or close after",
        "samples are of datasets 1 to 1, but the ledger was opened with 1 dataset",
        "step 3 failed after the optimizer had taken it",
        "step 3 failed after the optimizer had taken it",
        "its InRunShapley was closed, and values of another one are not in it",
        "steps up to 2 are in it, and none of another",
        "was closed: make another",
    ]
    for said in two_ranks.run(_misuses, str(tmp_path), timeout=300):
        assert len(said) == len(expected)
        for found, wanted in zip(said, expected, strict=True):
            assert wanted in found
    _require_whole(tmp_path, 2, 8)


def test_a_start_of_pretrain_leaves_the_ledger_of_an_own_loop(two_ranks: Workers, tmp_path: Path) -> None:
    """It has no checkpoint that says whose it is."""
    from inrun_megatron.ledger.belongs import ResumePoint, require_own
    from inrun_megatron.ledger.description import Starts
    from inrun_megatron.ledger.run import open_ledger

    two_ranks.run(_train, Part(DATA, str(tmp_path), (1, 2), ()), timeout=300)
    with open_ledger(tmp_path / "shapley") as ledger:
        starts = Starts(ledger.directory, ledger.run)
        with pytest.raises(UserError, match="of a loop of its own, but no checkpoint is loaded"):
            require_own(ledger, starts, ResumePoint(), save=None, train_iters=9)


def _commits_again(rank: int, world: int, directory: str) -> list[str]:
    """What further calls say once a commit has failed."""
    from inrun_megatron import InRunShapley, RunLedger, ShapleyTarget
    from inrun_megatron.errors import UserError
    from inrun_megatron.keeping import commits
    from inrun_megatron.models import token_losses

    engine = build_engine(DATA)
    layout = Layout.current()
    given = [ShapleyTarget(t.name, share(t, layout, 2, pipeline=False), t.num_tokens) for t in DATA.targets()]
    shapley = InRunShapley(engine, given, token_losses)
    ledger = RunLedger(shapley, directory, ["synthetic"])
    said = []
    with pytest.raises(UserError) as second:
        RunLedger(shapley, f"{directory}-2", ["synthetic"])
    said.append(str(second.value))
    with shapley.step(1) as step:
        for m in next(iter(DATA.batches()))[layout.dp_rank]:
            with step.samples(m["dataset"], m["sample"], m["loss_mask"]):
                forward_backward(engine, m)

    def full(*_: object) -> None:
        raise UserError("No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commits, "commit", full)
        for call in (ledger.commit, ledger.commit, ledger.close):
            with pytest.raises(UserError) as error:
                call()
            said.append(str(error.value))
    assert shapley.ledger is None
    return said


def test_after_a_commit_that_failed_there_is_no_other(two_ranks: Workers, tmp_path: Path) -> None:
    for second, first, again, close in two_ranks.run(_commits_again, str(tmp_path / "a"), timeout=300):
        assert "kept in a ledger already" in second and "No space left" in first
        assert "a commit has failed" in again and "a commit has failed" in close
    assert Ledger(tmp_path / "a").last_step == 0
