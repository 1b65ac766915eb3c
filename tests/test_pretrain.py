"""Whole runs on real text: checkpoints and exact resumption, the ledger hand-over, errors."""

from __future__ import annotations

import csv
import json
import os
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from inrun_megatron.ledger.lock import DirectoryLock
from tests import real_text
from tests.distributed import DistributedError, Workers, run_distributed
from tests.real_text import TARGETS, arguments, checkpoint_differences, ledger, refused, run_here
from tests.test_ledger_write import file_size_limit

data = real_text.data  # a fixture


# --- resumption ------------------------------------------------------------------------------------------------------


RESUMED = [
    ("--zero-stage 0 --no-shapley", 2),
    ("--zero-stage 1 --bf16 --shapley-refresh 4 --shapley-direction-dtype bf16", 2),
    ("--zero-stage 2 --tensor-model-parallel-size 2 --sequence-parallel --recompute-granularity full", 1),
    ("--zero-stage 3 --shapley-estimator midpoint", 2),
    ("--pipeline-model-parallel-size 2 --zero-stage 1 --recompute-granularity full", 1),
    ("--pipeline-model-parallel-size 2 --zero-stage 1 --bf16 --shapley-base drift", 1),
    (
        "--pipeline-model-parallel-size 2 --zero-stage 0 --untie-embeddings-and-output-weights --shapley-refresh 4",
        1,
    ),
]


@pytest.mark.parametrize(("flags", "writers"), RESUMED, ids=[flags for flags, _ in RESUMED])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    two_ranks: Workers, data: Path, tmp_path: Path, flags: str, writers: int
) -> None:
    """With dropout. The interrupted run lost its last two steps after their ledger commit: they are rolled back."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    scoring = () if "--no-shapley" in flags else TARGETS
    argv = arguments(data, *flags.split(), *scoring, "--save-interval", "2")
    two_ranks.run(run_here, [*argv, "--save", str(whole)])
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "iter_0000004")
    (resumed / "checkpoints" / "latest").write_text("iter_0000002")
    two_ranks.run(run_here, [*argv, "--save", str(resumed), "--load", str(resumed)])
    last = "checkpoints/iter_0000004"
    assert checkpoint_differences(whole / last, resumed / last) == []
    # Control: an earlier checkpoint does differ.
    assert checkpoint_differences(whole / last, whole / "checkpoints/iter_0000002")
    state = json.loads((resumed / last / "run_state.json").read_text())
    assert (state["iteration"], state["consumed_samples"]) == (4, 32)
    if not scoring:
        return
    values, steps = (ledger(whole, table) for table in ("values", "steps"))
    assert values == ledger(resumed, "values") and steps == ledger(resumed, "steps")
    # Adam has no second moment before its first step, which is then not scored; two targets.
    assert {row["status"].split(":")[0] for row in steps if row["step"] > 1} == {"scored"}
    scored = {row["step"] for row in steps if row["status"] == "scored"}
    assert len(values) == len(scored) * 8 * 2 and state["ledger_step"] == 4
    assert len(list((whole / "shapley" / "values").glob("*-0000000004-*.parquet"))) == writers
    run = json.loads((whole / "shapley" / "run.json").read_text())
    assert [target["name"] for target in run["targets"]] == ["code", "prose"]
    assert [dataset["name"] for dataset in run["datasets"]] == ["code", "prose"]
    assert run["coverage"]["missing"] == [] and run["versions"]["deepspeed"]


@pytest.mark.parametrize(
    "flags",
    [
        "--zero-stage 1 --shapley-estimator midpoint",
        "--zero-stage 3 --shapley-estimator simpson --shapley-interval 2",
        "--tensor-model-parallel-size 2 --sequence-parallel --zero-stage 2 --shapley-base drift",
        "--pipeline-model-parallel-size 2 --zero-stage 1 --shapley-estimator simpson",
    ],
)
def test_scoring_leaves_no_trace_in_the_checkpoint(
    two_ranks: Workers, data: Path, tmp_path: Path, flags: str
) -> None:
    """Weights, masters, moments, counters, schedules and random generators, with dropout, one row per microbatch."""
    argv = arguments(data, *flags.split(), *TARGETS, "--micro-batch-size", "1")
    two_ranks.run(run_here, [*argv, "--save", str(tmp_path / "scored")])
    two_ranks.run(run_here, [*argv, "--save", str(tmp_path / "plain"), "--no-shapley"])
    last = "checkpoints/iter_0000004"
    found = checkpoint_differences(tmp_path / "scored" / last, tmp_path / "plain" / last)
    assert [text for text in found if "/progress/ledger_step" not in text] == []
    steps = [row for row in ledger(tmp_path / "scored", "steps") if row["status"] == "scored"]
    assert len(steps) == (2 if "interval" in flags else 4) * 2
    base = "current" if "midpoint" in flags else "drift"
    assert {row["base"] for row in steps} == {base} and all(row["credit_factor"] >= 1 for row in steps)


@pytest.mark.parametrize("batch", [4, 16])
def test_a_resume_may_change_the_global_batch(
    two_ranks: Workers, data: Path, tmp_path: Path, batch: int
) -> None:
    """The data goes on where it was, and so do learning rates, whose schedule is given in steps, and the figures' files."""
    argv = arguments(
        data, *TARGETS, "--lr-decay-style", "cosine", "--weight-decay", "0", "--train-iters", "6"
    )
    ends = ("--csv-dir", "{0}/figures", "--save", "{0}")
    whole, resumed = str(tmp_path / "whole"), str(tmp_path / "resumed")
    two_ranks.run(run_here, [*argv, *(text.format(whole) for text in ends)])
    argv += [text.format(resumed) for text in ends]
    two_ranks.run(run_here, [*argv, "--exit-interval", "4"])
    two_ranks.run(run_here, [*argv, "--load", resumed, "--global-batch-size", str(batch)])

    def read(run: str) -> tuple[list[float], list[tuple[int, int, int]]]:
        with open(next(Path(run, "figures").rglob("*train_lr.csv"))) as file:
            rates = [
                float(rate) for _, rate in list(csv.reader(file))[1:]
            ]  # a resume writes no second headline
        rows = {(row["step"], row["dataset"], row["sample"]) for row in ledger(Path(run), "values")}
        return rates, sorted(rows)

    (rates, samples), (rates_resumed, samples_resumed) = read(whole), read(resumed)
    assert rates_resumed == pytest.approx(rates) and len(set(rates)) == 6
    assert (len(samples), len(samples_resumed)) == (6 * 8, 4 * 8 + 2 * batch)
    dealt, dealt_resumed = (
        [place[1:] for place in rows if place[0] > 4] for rows in (samples, samples_resumed)
    )
    fewer, more = sorted((dealt, dealt_resumed), key=len)
    assert set(fewer) <= set(more)
    state = json.loads((Path(resumed) / "checkpoints" / "iter_0000006" / "run_state.json").read_text())
    assert state["consumed_samples"] == 4 * 8 + 2 * batch


def _said(rank: int, world: int, argv: list[str]) -> list[str]:
    """What rank 0 says of a run's start and end."""
    from inrun_megatron.training import run

    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_say", said.append)
        run_here(rank, world, argv)
    return said


def test_a_resume_says_when_samples_come_in_another_order(
    two_ranks: Workers, data: Path, tmp_path: Path
) -> None:
    """Eight samples an epoch: a ninth needs a second epoch, for which megatron-core shuffles both anew."""
    flags = "--no-shapley --data-path {data}/target --split 1 --micro-batch-size 1 --global-batch-size 2"
    argv = arguments(data, *flags.split(), "--save", str(tmp_path), "--load", str(tmp_path))
    two_ranks.run(run_here, [*argv, "--exit-interval", "1"])
    same, longer = [*argv, "--exit-interval", "2"], [*argv, "--train-iters", "5", "--exit-interval", "3"]
    for start, changes in ((same, 0), (longer, 1), (longer, 0)):
        resumed, *changed = two_ranks.run(_said, start)[0]
        assert resumed.startswith("resumed from") and len(changed) == changes
        assert all("some samples come again, some never" in line for line in changed)


def test_a_resume_says_what_it_does_not_do(two_ranks: Workers, data: Path, tmp_path: Path) -> None:
    """A run that is over trains nothing more, also where --train-iters lies behind its checkpoint; and steps get smaller."""
    argv = arguments(data, "--no-shapley", "--lr-warmup-iters", "0", "--micro-batch-size", "1")
    argv += ["--save", str(tmp_path), "--load", str(tmp_path), "--train-iters"]
    two_ranks.run(run_here, [*argv, "2"])
    written = (tmp_path / "config.yaml").read_text()
    for steps in ("2", "1"):
        resumed, nothing = two_ranks.run(_said, [*argv, steps])[0]
        assert resumed.endswith("after step 2")
        assert nothing == f"nothing is left to train: --train-iters is {steps}"
        assert (tmp_path / "config.yaml").read_text() == written
    _, smaller = two_ranks.run(_said, [*argv, "3", "--global-batch-size", "2"])[0]
    assert smaller == "steps have 2 samples from here on, 8 before"


def test_a_run_can_be_repeated_from_its_yaml(two_ranks: Workers, data: Path, tmp_path: Path) -> None:
    argv = arguments(data, "--no-shapley", "--zero-stage", "1", "--save", str(tmp_path / "one"))
    two_ranks.run(run_here, argv)
    assert yaml.safe_load((tmp_path / "one" / "config.yaml").read_text())["parallel"]["zero_stage"] == 1
    two_ranks.run(
        run_here, ["--config", str(tmp_path / "one" / "config.yaml"), "--save", str(tmp_path / "two")]
    )
    last = "checkpoints/iter_0000004"
    assert checkpoint_differences(tmp_path / "one" / last, tmp_path / "two" / last) == []


def test_a_run_without_a_ledger_holds_its_checkpoints(two_ranks: Workers, data: Path, tmp_path: Path) -> None:
    argv = arguments(
        data, "--no-shapley", "--zero-stage", "1", "--save", str(tmp_path), "--load", str(tmp_path)
    )
    once = ["--train-iters", "1", "--lr-warmup-iters", "0"]
    two_ranks.run(run_here, [*argv, *once])  # gives the directory back
    before = sorted(tmp_path.rglob("*"))
    with closing(DirectoryLock(tmp_path / "checkpoints")):
        message = refused(two_ranks, argv)
    assert "is being written by another run" in message and "choose another --save" in message
    assert sorted(tmp_path.rglob("*")) == before


# --- bad input after the ranks have met ------------------------------------------------------------------------------


def _run_until_deepspeed(rank: int, world: int, argv: list[str]) -> None:
    from inrun_megatron.keeping.agreement import AgreedError
    from inrun_megatron.training import distributed

    def initialise(parallel: Any) -> None:
        raise AgreedError("DeepSpeed was started")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "initialise", initialise)
        run_here(rank, world, argv)


def test_bad_checkpoints_and_ledgers_are_refused_by_all_ranks(
    two_ranks: Workers, data: Path, tmp_path: Path
) -> None:
    run = str(tmp_path / "run")
    argv = arguments(
        data, *TARGETS, "--zero-stage", "1", "--save", run, "--train-iters", "1", "--lr-warmup-iters", "0"
    )
    two_ranks.run(run_here, argv)
    assert "holds the checkpoints of a run" in refused(two_ranks, argv)
    beside = ["--shapley-dir", f"{run}/shapley", "--save", str(tmp_path / "beside")]
    assert "holds the ledger of run" in refused(two_ranks, [*argv, *beside])
    # A ledger that is not of the loaded checkpoint, or is finished, is not taken back.
    whole = ledger(tmp_path / "run", "values")
    beside += ["--load", str(tmp_path / "beside")]
    assert f"of --save {run}, but no checkpoint is loaded" in refused(two_ranks, [*argv, *beside])
    state = json.loads((tmp_path / "run" / "checkpoints" / "iter_0000001" / "run_state.json").read_text())
    assert state["ledger"] == json.loads((tmp_path / "run" / "shapley" / "run.json").read_text())["run_id"]
    shutil.move(tmp_path / "run" / "checkpoints", tmp_path / "moved")
    assert "finished after step 1" in refused(two_ranks, [*argv, "--load", run])
    shutil.move(tmp_path / "moved", tmp_path / "run" / "checkpoints")
    shutil.move(tmp_path / "run" / "shapley", tmp_path / "moved")
    lost = f"shapley holds no ledger, but the checkpoint of step 1 belongs to that of run {state['ledger']}"
    assert lost in refused(two_ranks, [*argv, "--load", run])
    shutil.move(tmp_path / "moved", tmp_path / "run" / "shapley")
    assert ledger(tmp_path / "run", "values") == whole
    assert "holds no checkpoint" in refused(two_ranks, [*argv, "--load", str(tmp_path / "none")])
    # A longer run goes on, one that repeats the data more often does not, and leaves config.yaml alone.
    longer = [*argv, "--load", run, "--train-iters"]
    two_ranks.run(run_here, [*longer, "2"])
    assert {row["step"] for row in ledger(tmp_path / "run", "steps")} == {1, 2}
    assert "--train-iters was 1, now 2000" in refused(two_ranks, [*longer, "2000"])
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["training"]["train_iters"] == 2
    (tmp_path / "run" / "checkpoints" / "iter_0000002" / "run_state.json").write_text("{")
    assert "no complete checkpoint" in refused(two_ranks, [*argv, "--load", run])


def _run_noting_syncs(rank: int, world: int, argv: list[str]) -> list[str]:
    """What a run syncs, in order."""
    synced: list[str] = []
    sync = os.fsync

    def noting(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", noting)
        run_here(rank, world, argv)
    return synced


def test_a_checkpoint_is_durable_before_it_is_named(two_ranks: Workers, data: Path, tmp_path: Path) -> None:
    """Every file by the rank that wrote it, then the directories; a file that was cut off is named in one line."""
    argv = arguments(data, "--no-shapley", "--zero-stage", "1", "--pipeline-model-parallel-size", "2")
    argv += ["--train-iters", "1", "--lr-warmup-iters", "0", "--save", str(tmp_path)]
    first, second = two_ranks.run(_run_noting_syncs, argv)
    root = tmp_path / "checkpoints"
    path = root / "iter_0000001"
    named = next(place for place, file in enumerate(first) if file.startswith(f"{root}/latest"))
    files = [str(file) for file in path.iterdir() if file.suffix in (".pt", ".json")]
    assert len(files) > 8 and set(files) <= {*first[:named], *second}
    assert {str(path), str(root)} <= set(first[:named])
    argv += ["--load", str(tmp_path)]
    for file in sorted(path.glob("*optim_states.pt"))[0], path / "shards_00001.json", path / "rng_00001.pt":
        content = file.read_bytes()
        file.write_bytes(content[:-100])
        assert f"{file} " in refused(two_ranks, argv)
        file.write_bytes(content)
    file.unlink()
    assert f"{file} is missing" in refused(two_ranks, argv)


def test_checkpoints_between_the_retained_are_deleted(two_ranks: Workers, data: Path, tmp_path: Path) -> None:
    """Once another is named in their place; over a resume, and where `latest` is of another run."""
    argv = arguments(data, "--no-shapley", "--save-interval", "1", "--save-retain-interval", "3")
    argv += ["--train-iters", "7", "--save", str(tmp_path)]
    root, seen = tmp_path / "checkpoints", []
    for load in ([], ["--load", str(tmp_path)]):
        two_ranks.run(run_here, [*argv, *load, *([] if load else ["--exit-interval", "4"])])
        seen.append(sorted(path.name for path in root.glob("iter_*")))
    assert seen == [["iter_0000003", "iter_0000004"], ["iter_0000003", "iter_0000006", "iter_0000007"]]
    other = tmp_path / "other"
    two_ranks.run(run_here, [*argv, "--train-iters", "8", "--load", str(tmp_path), "--save", str(other)])
    assert sorted(path.name for path in root.glob("iter_*")) == seen[1]
    assert [path.name for path in (other / "checkpoints").glob("iter_*")] == ["iter_0000008"]


def _run_on_a_full_disk(rank: int, world: int, argv: list[str], size: int) -> None:
    """Checkpoints meet a disk without space for files beyond `size` bytes."""
    from inrun_megatron.training import checkpoint

    save = checkpoint.save

    def limited(*given: Any) -> Path:
        with file_size_limit(size):
            return save(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", limited)
        run_here(rank, world, argv)


@pytest.mark.parametrize("size", [10_000, 50_000])
def test_a_full_disk_at_a_checkpoint_is_one_line(data: Path, tmp_path: Path, size: int) -> None:
    argv = arguments(
        data, "--no-shapley", "--train-iters", "1", "--lr-warmup-iters", "0", "--save", str(tmp_path)
    )
    with pytest.raises(
        DistributedError, match=r"UserError: cannot write \S+/iter_0000001: .* free or repair it"
    ):
        run_distributed(_run_on_a_full_disk, 1, argv, size)
    assert not (tmp_path / "checkpoints" / "latest").exists()


def test_bad_data_is_refused_by_all_ranks_before_deepspeed_compiles(
    two_ranks: Workers, data: Path, tmp_path: Path
) -> None:
    def refused_early(*argv: str) -> str:
        return refused(two_ranks, list(argv), _run_until_deepspeed)

    argv = arguments(data, "--no-shapley")
    assert "none.idx does not exist" in refused_early(*argv, "--data-path", str(data / "none"))
    assert "none.idx does not exist" in refused_early(
        *argv, "--data-path", str(data / "none"), "--tokenizer-type", "bytes"
    )
    assert "--vocab-size is 100" in refused_early(*argv, "--vocab-size", "100")
    assert "holds no checkpoint" in refused_early(*argv, "--load", str(tmp_path / "none"))
    assert "DeepSpeed was started" in refused_early(*argv), "the control"
    broken = tmp_path / "broken"
    for suffix in (".idx", ".json"):
        shutil.copy(data / f"code{suffix}", f"{broken}{suffix}")
    Path(f"{broken}.bin").write_bytes((data / "code.bin").read_bytes()[:-100])
    assert "truncated" in refused_early(*argv, "--data-path", str(broken))
    short = ["--seq-length", "4096", "--max-position-embeddings", "4096"]
    target = arguments(
        data, "--shapley-target", f"code={data}/target", "--save", str(tmp_path / "run"), *short
    )
    assert "fewer than one sequence" in refused_early(*target)
