"""What the ledger holds: tables, records and names. docs/ledger.md explains every column.

Legend: n samples of one step on one data-parallel rank, K targets in run.json's order.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from inrun_megatron.errors import UserError

SCHEMA_VERSION = 3
"""Raised when a column or a rule changes so that an older reader would misread the files."""

RUN_FILE = "run.json"
LOCK_FILE = "LOCK"
VALUES, STEPS, COMMITS = "values", "steps", "commits"
DEFAULT_SUBDIRECTORY = "shapley"

MAXIMUM_DATASETS = 1 << 15
"""Of the column `dataset`, int16."""

SCORED = "scored"
CURRENT, DRIFT = "current", "drift"

# Keys of the Parquet files' own metadata, so that a part that was moved away still says what it is.
META_VERSION, META_RUN, META_TABLE = b"inrun.schema_version", b"inrun.run_id", b"inrun.table"

VALUES_SCHEMA = pa.schema(
    [
        pa.field("step", pa.int32(), nullable=False),
        pa.field("dataset", pa.int16(), nullable=False),
        pa.field("sample", pa.int64(), nullable=False),
        pa.field("segment", pa.int32(), nullable=False),
        pa.field("target", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("tokens", pa.int32(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
    ]
)

STEPS_SCHEMA = pa.schema(
    [
        pa.field("step", pa.int32(), nullable=False),
        pa.field("target", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("consumed_samples", pa.int64()),
        pa.field("samples", pa.int32(), nullable=False),
        pa.field("lr", pa.float64()),
        pa.field("train_loss", pa.float64()),
        pa.field("grad_norm", pa.float64()),
        pa.field("clip_coefficient", pa.float64()),
        pa.field("credit_factor", pa.float64()),
        pa.field("base", pa.string(), nullable=False),
        pa.field("direction_age", pa.int32()),
        pa.field("target_loss", pa.float64()),
        pa.field("realised", pa.float64()),
        pa.field("sum_values", pa.float64()),
        pa.field("momentum_term", pa.float64()),
        pa.field("decay_term", pa.float64()),
        pa.field("additivity_lhs", pa.float64()),
        pa.field("additivity_rhs", pa.float64()),
        pa.field("seconds_total", pa.float64()),
        pa.field("seconds_scoring", pa.float64()),
    ]
)

SCHEMAS = {VALUES: VALUES_SCHEMA, STEPS: STEPS_SCHEMA}

PER_TARGET_FIELDS = (
    "target_loss",
    "realised",
    "sum_values",
    "momentum_term",
    "decay_term",
    "additivity_lhs",
    "additivity_rhs",
)

PerTarget = Sequence[float | None] | None


@dataclass
class StepRecord:
    """One training step, for all K targets; one row per target in `steps/`.

    Scalars that are unknown are None. The per-target fields are sequences of K numbers (or None each), or
    None when unknown for all. Units: losses and values in nats per token of the target, seconds of wall time.
    """

    step: int
    """Training iteration, counted from 1."""
    status: str = SCORED
    """`scored`, or `skipped: <reason>`: overflow (the optimizer took no step), values are not finite."""
    consumed_samples: int | None = None
    """Training samples consumed at the end of this step, over the whole run."""
    samples: int = 0
    """Samples scored in this step over all writers: the step's rows per target with segment 0 in `values/`; 0 unless
    scored."""
    lr: float | None = None
    train_loss: float | None = None
    grad_norm: float | None = None
    """Global norm of G_t before clipping."""
    clip_coefficient: float | None = None
    """c_t: the factor the optimizer's gradient was multiplied by; 1 without clipping."""
    credit_factor: float | None = None
    """What a value of the step's own game is multiplied by for the gradient's whole weight through the moments
    (trajectory credit); the rows are of the kind that run.json's configuration names."""
    base: str = CURRENT
    """Where target_loss was taken: `current` (w_t) or `drift` (Phi_t(0), where momentum and decay alone lead)."""
    direction_age: int | None = None
    """Steps since the direction was taken: 0 in the step itself, more with --shapley-refresh, where target_loss and the
    momentum and decay terms are then unknown."""
    target_loss: PerTarget = None
    """L_k before the step, at the base point."""
    realised: PerTarget = None
    """target_loss less that of the next step; None until known (readers fill it in)."""
    sum_values: PerTarget = None
    """sum_i phi_i over the step's samples."""
    momentum_term: PerTarget = None
    """First-order loss change due to the optimizer's momentum: the part that no sample of this step
    causes."""
    decay_term: PerTarget = None
    """First-order loss change due to weight decay."""
    additivity_lhs: PerTarget = None
    """sum_i <d_{t,k}, g_i> from the taps, before clipping (the values are c_t times its summands)."""
    additivity_rhs: PerTarget = None
    """<d_{t,k}, G_t> with G_t from the optimizer's own gradient buffers, before clipping."""
    seconds_total: float | None = None
    seconds_scoring: float | None = None


@dataclass
class RunDescription:
    """What run.json says of a run; everything in it must be JSON-serialisable."""

    targets: Sequence[Mapping[str, Any]]
    """One mapping per target, in the order of `values` at `LedgerWriter.append`; each has `name`."""
    datasets: Sequence[Mapping[str, Any]]
    """The dataset table (`DatasetDescription.to_dict()` of each); each has `index` and `name`."""
    configuration: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    layout: Mapping[str, Any] = field(default_factory=dict)
    coverage: Mapping[str, Any] | None = None
    """`Coverage.to_dict()` of the taps: how many parameters there are and have a tap, and the names of those without."""
    run_id: str = field(default_factory=lambda: str(uuid.uuid4()))

    def to_dict(self) -> dict[str, Any]:
        """The content of run.json. Raises UserError on target names that are missing or not distinct, and on more datasets
        than rows can number."""
        names = [str(target.get("name", "")) for target in self.targets]
        if not names or "" in names or len(set(names)) != len(names):
            raise UserError(
                f"targets need distinct, non-empty names, got {names}; rename them in --shapley-target"
            )
        if len(self.datasets) > MAXIMUM_DATASETS:
            raise UserError(
                f"{len(self.datasets):,} datasets: rows number {MAXIMUM_DATASETS:,} at most; put several into one"
            )
        return {
            "schema_version": SCHEMA_VERSION,
            "run_id": self.run_id,
            "created": now(),
            "configuration": dict(self.configuration),
            "targets": [dict(target) for target in self.targets],
            "datasets": [dict(dataset) for dataset in self.datasets],
            "versions": dict(self.versions),
            "layout": dict(self.layout),
            "coverage": None if self.coverage is None else dict(self.coverage),
        }


@dataclass(frozen=True)
class PartInfo:
    """One written Parquet file, as a commit record names it."""

    file: str
    """Path relative to the ledger directory, with forward slashes."""
    rows: int
    bytes: int
    sha256: str
    first_step: int
    last_step: int

    @property
    def table(self) -> str:
        """`values` or `steps`."""
        return self.file.split("/", 1)[0]

    def to_dict(self) -> dict[str, Any]:
        """As a commit record holds it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> PartInfo:
        """Raises KeyError, TypeError or ValueError on a record that is not a part's."""
        return cls(
            file=str(record["file"]),
            rows=int(record["rows"]),
            bytes=int(record["bytes"]),
            sha256=str(record["sha256"]),
            first_step=int(record["first_step"]),
            last_step=int(record["last_step"]),
        )


def granularity_of(run: Mapping[str, Any]) -> str:
    """What a row of `values/` is of: `sample`, `document` or `token`, by run.json's configuration."""
    shapley = (run.get("configuration") or {}).get("shapley")
    return str(shapley.get("granularity", "sample")) if isinstance(shapley, Mapping) else "sample"


def part_name(table: str, first_step: int, last_step: int, writer: int) -> str:
    """`values/part-0000000001-0000000050-w3.parquet`; zero-padded so that names sort by step."""
    return f"{table}/part-{first_step:010d}-{last_step:010d}-w{writer}.parquet"


def commit_name(step: int) -> str:
    """`commits/0000000050.json`; zero-padded so that names sort by step."""
    return f"{COMMITS}/{step:010d}.json"


def check_version(found: Any, path: Path) -> None:
    """Raise UserError when a file follows another schema than this package reads."""
    if found != SCHEMA_VERSION:
        raise UserError(
            f"{path} follows ledger schema {found!r}, this package reads schema {SCHEMA_VERSION}; "
            "use the inrun-megatron release that wrote it (run.json names it under versions)"
        )


def now() -> str:
    """UTC time, ISO 8601, seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")
