"""Which rows of two runs are the same.

Documents are matched by origin (data/origin.py): the dataset they were first prepared in and their number there, whatever
the order, blend or curation of the runs. Samples are matched only between datasets that both runs cut and shuffled alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from inrun_megatron.data.origin import Origin, origin_of
from inrun_megatron.errors import UserError
from inrun_megatron.ledger.read import Ledger
from inrun_megatron.report.documents.lookup import Documents
from inrun_megatron.report.phases import Phase
from inrun_megatron.report.query import Query, quoted
from inrun_megatron.report.values.ranking import Level
from inrun_megatron.report.values.scores import Measure, Per

_ORIGINS = pa.schema([("dataset", pa.int16()), ("origin", pa.string())])
_NUMBERS = pa.schema([("dataset", pa.int16()), ("document", pa.int64()), ("number", pa.int64())])


@dataclass(frozen=True)
class Side:
    """One of the two runs and the steps of it that count."""

    ledger: Ledger
    documents: Documents
    phase: Phase


def shared_targets(a: Ledger, b: Ledger, target: str | None) -> list[str]:
    """Targets that both runs have, or the one named. Raises UserError where there is none."""
    names = [name for name in a.target_names if name in b.target_names]
    if (target is not None and target not in names) or not names:
        wanted = "no target in common" if target is None else f"no target {target!r} in common"
        raise UserError(
            f"the runs have {wanted}: the first has {', '.join(a.target_names)}, the second {', '.join(b.target_names)}"
        )
    return names if target is None else [target]


def export_scores(
    query: Query, identities: tuple[pa.Table, pa.Table], level: Level, measure: Measure, per: Per, file: Path
) -> None:
    """Write the scores of one run with what identifies their rows: origin, number."""
    origins, numbers = identities
    query.register("origins", origins)
    query.register("numbers", numbers)
    key = level.value
    number = f"coalesce(n.number, f.{key})" if level is Level.document else f"f.{key}"
    join = (
        "LEFT JOIN numbers n ON f.dataset = n.dataset AND f.document = n.document"
        if level is Level.document
        else ""
    )
    divided = "/ sum(f.tokens)" if per is Per.token else ""
    kept = "HAVING sum(f.tokens) > 0" if per is Per.token else ""
    # A dataset that stands in the blend twice gives a document twice: its values are added.
    query.copy(
        f"COPY (SELECT o.origin, {number} AS number, f.target, min(f.dataset) AS dataset, min(f.{key}) AS {key}, "
        f"sum(f.{measure.value}) {divided} AS score FROM figures f JOIN origins o ON f.dataset = o.dataset {join} "
        f"GROUP BY ALL {kept}) TO {quoted(str(file))} (FORMAT parquet)"
    )


def origins_of(side: Side, level: Level) -> list[Origin]:
    """The origin of each dataset; of samples, with how they were cut and shuffled in place of the .idx alone."""
    found = []
    for index, description in enumerate(side.ledger.datasets):
        if level is Level.sample:
            cut = description.get("index_sha256") or {}
            name = "/".join([str(description.get("idx_sha256")), *(str(cut[name]) for name in sorted(cut))])
            found.append(Origin(name, description.get("bin_digest")))
        else:
            file = side.documents.resolver.file(index)
            found.append(origin_of(file, side.documents.idx_sha256(index)))
    return found


def identities(found: Sequence[Origin], by_content: bool) -> tuple[pa.Table, pa.Table]:
    """What makes rows of this run comparable: an origin per dataset; numbers there of documents of curated datasets."""
    origins: list[dict[str, Any]] = []
    numbers = [_NUMBERS.empty_table()]
    for index, origin in enumerate(found):
        if origin.numbers is not None:
            columns = [
                pa.array([index] * len(origin.numbers), pa.int16()),
                pa.array(range(len(origin.numbers)), pa.int64()),
                pa.array(origin.numbers, pa.int64()),
            ]
            numbers.append(pa.Table.from_arrays(columns, schema=_NUMBERS))
        name = f"{origin.idx_sha256}/{origin.bin_digest}" if by_content else origin.idx_sha256
        origins.append({"dataset": index, "origin": name})
    return pa.Table.from_pylist(origins, _ORIGINS), pa.concat_tables(numbers)


def same_target(a: Side, b: Side, name: str) -> bool:
    """Are the two targets of this name the same sequences, wherever they lay? By what both descriptions say."""
    one, other = (side.ledger.targets[side.ledger.target_names.index(name)] for side in (a, b))
    return all(one[key] == other[key] for key in one.keys() & other.keys() if key != "path")


def nothing_shared(a: Side, b: Side, level: Level) -> str:
    read = [", ".join(side.ledger.dataset_names) for side in (a, b)]
    if level is Level.sample:
        return (
            f"no sample is the same in both runs (they read {read[0]} and {read[1]}, cut or shuffled differently, or in "
            "other steps): compare by document"
        )
    return (
        f"no document was scored in both runs: they read {read[0]} and {read[1]}; they must share a dataset, as it is or "
        "through inrun curate (the .idx files differ), and steps that read the same documents"
    )
