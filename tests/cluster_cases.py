"""One small training run, started in many ways; its ledger must always be that of the undisturbed run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from inrun_megatron.data.prepare import prepare
from inrun_megatron.ledger import Ledger
from tests import hosts

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = "launch/pretrain.py"
RANKS = 4
STEPS = 40
HEARTBEAT = 15
"""Seconds; short for the tests, long enough for a loaded machine."""
TIMEOUT = 900.0
"""Seconds that any one run may take: half a minute on two idle cores."""
FLAGS = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --micro-batch-size 2 --global-batch-size 8 "
    f"--train-iters {STEPS} --lr 1e-2 --eval-interval 0 --log-interval 1 --split 100,0,0 --save-interval 8 "
    f"--tensor-model-parallel-size 2 --sequence-parallel --zero-stage 1 --heartbeat-timeout {HEARTBEAT}"
)


@dataclass(frozen=True)
class Reference:
    """Prepared data and the ledger of a run on one host that nothing disturbed."""

    directory: Path
    rows: pa.Table
    steps: pa.Table

    def flags(self, run: Path) -> list[str]:
        """The same run in the directory `run`, from its checkpoint where there is one."""
        return flags(self.directory, run)

    def agrees(self, run: Path) -> None:
        """AssertionError unless the ledger of `run` is the reference's, bit for bit, and passes `inrun verify`."""
        rows, steps = ledger(run)
        assert steps.column("step").to_pylist() == list(range(1, STEPS + 1))
        assert rows.equals(self.rows), difference(rows, self.rows)
        assert steps.equals(self.steps), difference(steps, self.steps)
        assert (run / "checkpoints" / "latest").read_text() == f"iter_{STEPS:07d}"
        inrun = Path(sys.executable).parent / "inrun"
        done = subprocess.run([inrun, "verify", run], capture_output=True, text=True, env=hosts.environment())
        assert done.returncode == 0, done.stdout + done.stderr

    def agrees_on_samples(self, run: Path, bitwise_until: int) -> None:
        """AssertionError unless the ledger of `run` has the reference's rows, and up to a step its values, too.

        After a resume in another layout dropout draws other numbers.
        """
        rows, _ = ledger(run)
        assert rows.drop_columns(["value"]).equals(self.rows.drop_columns(["value"])), difference(
            rows, self.rows
        )
        same, before = (table.filter(pc.field("step") <= bitwise_until) for table in (rows, self.rows))
        assert same.num_rows and same.equals(before), difference(same, before)


def difference(one: pa.Table, other: pa.Table) -> str:
    unequal = [name for name in one.column_names if not one.column(name).equals(other.column(name))]
    return f"{one.num_rows} rows against {other.num_rows}; columns that differ: {', '.join(unequal)}"


def ledger(run: Path) -> tuple[pa.Table, pa.Table]:
    """Values and steps that are committed, in order, without the times."""
    opened = Ledger(run)
    values, steps = opened.values().to_table(), opened.steps()
    target = values.schema.get_field_index("target")
    values = values.set_column(target, "target", values.column("target").cast(pa.string()))
    key = [(name, "ascending") for name in ("step", "dataset", "sample", "segment", "target")]
    timeless = [name for name in steps.column_names if not name.startswith("seconds")]
    return values.sort_by(key).combine_chunks(), steps.select(timeless).combine_chunks()


def flags(directory: Path, run: Path) -> list[str]:
    data = ["--data-path", str(directory / "code"), "--shapley-target", f"code={directory / 'target'}:3"]
    return [*FLAGS.split(), *data, "--save", str(run), "--load", str(run)]


def build_reference(directory: Path) -> Reference:
    """Prepare the data and train once on this host."""
    library = Path(os.__file__).parent
    prepare(
        [library / f"{name}.py" for name in ("abc", "bisect", "copy", "heapq", "queue")], directory / "code"
    )
    (directory / "small.txt").write_text("def target(x):\n    return x + 1\n" * 8)
    prepare([directory / "small.txt"], directory / "target")
    run = directory / "reference"
    start = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(RANKS),
    ]
    done = subprocess.run(
        [*start, str(ROOT / SCRIPT), *flags(directory, run)],
        env=hosts.environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return Reference(directory, *ledger(run))


def edited(template: Path, values: dict[str, str], to: Path) -> Path:
    """`template` with lines replaced as a user edits them: by their start, and only lines that are marked EDIT."""
    lines = template.read_text().splitlines()
    left = dict(values)
    for number, line in enumerate(lines):
        for start in [start for start in left if line.lstrip().startswith(start)]:
            assert "# EDIT" in line, f"{template.name} does not mark this line for editing: {line}"
            lines[number] = left.pop(start)
    assert not left, f"{template.name} has no lines that start with {', '.join(left)}"
    to.write_text("\n".join(lines) + "\n")
    return to


def committed_step(run: Path) -> int:
    """The last step in the ledger of `run`; 0 without any."""
    commits = sorted((run / "shapley" / "commits").glob("*.json"))
    return int(json.loads(commits[-1].read_text())["step"]) if commits else 0


def errors(log: Path) -> list[str]:
    """The lines that the program itself writes about an error. pdsh puts the host before each line of the log."""
    return re.findall(r"^(?:node\d+: )?(error: .*)$", log.read_text(errors="replace"), flags=re.M)


def environment(directory: Path, **extra: str) -> dict[str, str]:
    """For launchers on hosts: DeepSpeed forwards little by itself, the rest through a file."""
    variables = hosts.environment(**extra)
    forwarded = (
        "PATH",
        "PYTHONPATH",
        "DS_ACCELERATOR",
        "OMP_NUM_THREADS",
        "TORCH_EXTENSIONS_DIR",
        "PYTHONUNBUFFERED",
    )
    file = directory / "deepspeed_env"
    file.write_text("".join(f"{name}={variables[name]}\n" for name in forwarded if name in variables))
    return {**variables, "DS_ENV_FILE": str(file)}
