"""What a resumed run must share with its ledger, and whose ledger a start may take back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inrun_megatron.errors import UserError
from inrun_megatron.ledger import (
    Ledger,
    LedgerWriter,
    RunDescription,
    commit,
    create_ledger,
    open_ledger,
    rollback,
)
from inrun_megatron.ledger.belongs import ResumePoint, require_own
from inrun_megatron.ledger.description import Starts
from tests.committed_ledger import run_or_resume
from tests.data_cases import build, write_pair
from tests.synthetic_ledger import description


def test_a_resume_needs_the_same_targets_and_datasets(tmp_path: Path) -> None:
    create_ledger(tmp_path, description([{"name": "code", "index": 0, "idx_sha256": "aa"}])).close()
    other = description([{"name": "code", "index": 0, "idx_sha256": "bb"}])
    with pytest.raises(
        UserError,
        match=r"dataset 0 .code. .* had an .idx file of SHA-256 aa, the resumed run has bb; resume with the datasets as they were .--data-path.",
    ):
        open_ledger(tmp_path, other)
    with pytest.raises(UserError, match="has 1 dataset, the resumed run 3"):
        open_ledger(tmp_path, description())
    same = description([{"name": "code", "index": 0, "idx_sha256": "aa"}], training={"lr": 5})
    open_ledger(tmp_path, same).close()


def test_a_resume_needs_the_same_text_under_the_same_index(tmp_path: Path) -> None:
    row = {"name": "code", "index": 0, "idx_sha256": "aa", "bin_digest": "x"}
    create_ledger(tmp_path, description([row])).close()
    with pytest.raises(
        UserError, match=r"dataset 0 .code. .* had a .bin file of digest x, the resumed run has y"
    ):
        open_ledger(tmp_path, description([row | {"bin_digest": "y"}]))
    one, other = description([row]), description([row])
    one.targets = [{**target, "tokens_sha256": "x"} for target in one.targets]
    other.targets = [{**target, "tokens_sha256": "y"} for target in other.targets]
    open_ledger(tmp_path, other).close()  # an older run did not note it
    create_ledger(tmp_path / "one", one).close()
    with pytest.raises(
        UserError,
        match=r"target 0 .code. .* had tokens of SHA-256 x, the resumed run has y; resume with the targets as they were .--shapley-target.",
    ):
        open_ledger(tmp_path / "one", other)


def test_a_longer_run_goes_on_while_samples_mean_the_same(tmp_path: Path) -> None:
    """Megatron's description names the samples asked for; what a sample is depends on the index arrays alone."""
    a, b = write_pair(tmp_path)

    def table(samples: int, *data_path: str, **options: Any) -> RunDescription:
        train, _ = build(*(data_path or (a,)), train_samples=samples, **options)
        training = {"train_iters": samples // 10, "global_batch_size": 10}
        return description([row.to_dict() for row in train.table], training=training)

    def resume(name: str, described: RunDescription) -> None:
        open_ledger(tmp_path / name, described).close()

    create_ledger(tmp_path / "one", table(50)).close()
    create_ledger(tmp_path / "blend", table(20, "0.7", a, "0.3", b)).close()
    resume("one", table(50))
    resume("one", table(100))
    resume("blend", table(60, "0.7", a, "0.3", b))
    # b has 25 samples an epoch: 31 of it are another shuffle, while a still needs one epoch
    with pytest.raises(
        UserError, match=r"dataset 1 \(.*b\) .*--train-iters was 2, now 10, .*for 31 samples"
    ) as error:
        resume("blend", table(100, "0.7", a, "0.3", b))
    assert "--exit-interval" in str(error.value) and "--shapley-dir" in str(error.value)
    with pytest.raises(UserError, match=r"dataset 0 .*--train-iters was 5, now 12, the data is repeated"):
        resume("one", table(120))
    with pytest.raises(UserError, match=r"other text than in the ledger: --seed was 7, now 8; resume with"):
        resume("one", table(50, seed=8))
    with pytest.raises(UserError, match=r"other text .*: --seq-length was 32, now 16;"):
        resume("one", table(50, seq_length=16))
    with pytest.raises(UserError, match=r"had the weight 0\.7, the resumed run has 0\.6"):
        resume("blend", table(20, "0.6", a, "0.4", b))
    # Data that has moved is the same data.
    moved = table(50)
    moved.datasets[0]["description"]["dataset_path"] = moved.datasets[0]["path_prefix"] = "/elsewhere"  # type: ignore[index]
    resume("one", moved)


@pytest.mark.parametrize(
    ("flag", "before", "after"),
    [
        ("credit", "step", "trajectory"),
        ("optimizer", "auto", "sgd"),
        ("estimator", "first_order", "midpoint"),
    ],
)
def test_a_resume_needs_the_same_kind_of_values(tmp_path: Path, flag: str, before: str, after: str) -> None:
    create_ledger(tmp_path, description()).close()
    message = rf"values of {flag} {before}, the resumed run has {after}; resume with {flag} {before} .--shapley-{flag}.,"
    with pytest.raises(UserError, match=message):
        open_ledger(tmp_path, description(shapley={flag: after}))
    open_ledger(tmp_path, description(shapley={flag: before})).close()


@pytest.mark.parametrize("name", ["eod_mask_loss", "reset_position_ids", "reset_attention_mask"])
def test_a_resume_needs_the_same_loss_of_its_targets(tmp_path: Path, name: str) -> None:
    """Each of these flags of the data makes L_k another function of the weights, over the same tokens."""
    plain, with_flag = description(), description()
    plain.targets, with_flag.targets = (
        [{**target, name: given} for target in plain.targets] for given in (False, True)
    )
    flag = name.replace("_", "-")
    create_ledger(tmp_path, plain).close()
    message = f"loss of target code under --no-{flag}, the resumed run has --{flag}; resume with --no-{flag},"
    with pytest.raises(UserError, match=message):
        open_ledger(tmp_path, with_flag)
    open_ledger(tmp_path, plain).close()
    open_ledger(tmp_path, description()).close()  # targets of a loop of one's own say nothing of it


def require(directory: Path, point: ResumePoint, *, save: str | None = None, train_iters: int = 100) -> None:
    with open_ledger(directory) as ledger:
        starts = Starts(directory, ledger.run)
        require_own(ledger, starts, point, save=save, train_iters=train_iters)


def test_only_the_checkpoints_own_ledger_is_taken_back(tmp_path: Path) -> None:
    run_or_resume(tmp_path)  # commits of checkpoints 2, 4 and 6
    own = Ledger(tmp_path).run_id
    require(tmp_path, ResumePoint(4, own, 4))
    require(tmp_path, ResumePoint(8, own, 6))  # steps 7 and 8 were not scored
    for point, message in (
        (ResumePoint(8, own, 8), "ends at step 6, but the checkpoint of step 8 follows its commit of step 8"),
        (ResumePoint(4, "another", 4), "with rows up to step 4, but the checkpoint of step 4 is not its own"),
        (ResumePoint(1, "another", 1), "that has saved iter_4, but the checkpoint of step 1 is not its own"),
        (ResumePoint(1, None), "that has saved iter_4"),
        (
            ResumePoint(),
            "that has saved iter_4, but no checkpoint is loaded, so that its commits up to step 6",
        ),
    ):
        with pytest.raises(UserError, match=message):
            require(tmp_path, point)
    with pytest.raises(UserError, match="finished after step 6, but no checkpoint is loaded"):
        require(tmp_path, ResumePoint(), train_iters=6)


def test_rows_of_steps_that_were_trained_again_without_scoring_are_taken_back(tmp_path: Path) -> None:
    """Checkpoint and commit of step 4; a commit of step 6, then a crash; --no-shapley from 4 to its checkpoint of 8."""
    run_or_resume(tmp_path)
    with open_ledger(tmp_path, description()) as ledger:
        point = ResumePoint(8, ledger.run_id, 4)
        kept = point.rows_up_to(ledger.run_id)
        rollback(tmp_path, kept)
        Starts(tmp_path, ledger.run).append(8, description(), point.ledger_step)
    found = Ledger(tmp_path)
    assert kept == found.last_step == 4 and found.starts.stretches_without_scoring() == [(5, 8)]


def test_what_a_crash_before_the_first_checkpoint_left_is_taken_back(tmp_path: Path) -> None:
    described = description(checkpoint={"save": str(tmp_path / "run")}, training={"train_iters": 4})
    with create_ledger(tmp_path, described):
        writer = LedgerWriter(tmp_path, 0)
        for step in (2, 3):  # the run began after step 1; its first checkpoint is not complete
            writer.append(step, [0], [step], [64], np.ones((1, 2)))
            commit(tmp_path, step, writer.write_parts(), "iter_3" if step == 3 else None)
    for point in (ResumePoint(), ResumePoint(1, "another", 1)):
        require(tmp_path, point, save=str(tmp_path / "run"))
        with pytest.raises(UserError, match=f"of --save {tmp_path}/run"):
            require(tmp_path, point, save=str(tmp_path / "other"))
    with pytest.raises(UserError, match="with rows up to step 2"):
        require(tmp_path, ResumePoint(2, "another", 2))
    with open_ledger(tmp_path):
        writer = LedgerWriter(tmp_path, 0)
        writer.append(4, [0], [4], [64], np.ones((1, 2)))
        commit(tmp_path, 4, writer.write_parts())
    with pytest.raises(UserError, match="finished after step 4"):  # more steps were asked for since
        require(tmp_path, ResumePoint(), save=str(tmp_path / "run"), train_iters=8)
