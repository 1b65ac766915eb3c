"""The one number per document that decisions are made by: several targets combined, per token or per document.

    score_d = sum_k w_k m_k(d) [/ tokens_k(d)]        m: sum of normalised (or raw) values of document d towards target k

Normalised values let every step weigh the same and put targets on one scale (report/query.py), so that weights mean what
they say; raw sums are ruled by the first steps. Per token, a long document counts no more than a short one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from math import isfinite

import pyarrow as pa

from inrun_megatron.errors import UserError
from inrun_megatron.ledger.read import Ledger
from inrun_megatron.report.documents.lookup import Documents
from inrun_megatron.report.phases import Phase
from inrun_megatron.report.query import Query
from inrun_megatron.report.values.ranking import KEYS, Level, create_figures


class Measure(StrEnum):
    """Which values are added up: normalised (every step weighs the same), relative to the step's realised loss change, or
    raw, in nats per token of the target (report/query.py)."""

    normalised = "normalised"
    relative = "relative"
    value = "value"


class Per(StrEnum):
    """What a sum is divided by: the tokens that were scored, or nothing."""

    token = "token"
    document = "document"


def parse_weights(ledger: Ledger, entries: Sequence[str]) -> dict[str, float]:
    """`NAME` or `NAME=WEIGHT` of --target -> weight by target; all targets with weight 1 where none is given.

    Raises UserError on unknown or repeated targets, and on weights that are no finite number or are all zero.
    """
    names = ledger.target_names
    weights: dict[str, float] = {}
    for entry in entries or names:
        # A target's own name may hold a "=".
        name, equals, text = (entry, "", "") if entry in names else entry.rpartition("=")
        if name not in names:
            raise UserError(
                f"--target {entry!r}: the run has the targets {', '.join(names)}; give NAME=WEIGHT"
            )
        if name in weights:
            raise UserError(f"--target {name} is given twice; give each target once, with one weight")
        try:
            weights[name] = float(text) if equals else 1.0
        except ValueError:
            raise UserError(f"--target {entry!r}: {text!r} is no number; give NAME=WEIGHT") from None
        if not isfinite(weights[name]):
            raise UserError(f"--target {entry!r}: the weight must be finite")
    if not any(weights.values()):
        raise UserError("all --target weights are 0, so that every score is 0; give one that is not")
    return weights


def create_scores(
    query: Query,
    level: Level,
    phase: Phase,
    weights: Mapping[str, float],
    measure: Measure,
    per: Per,
    documents: Documents | None = None,
) -> None:
    """(Re)create the relation `scores`: one row per sample or document, over the steps of `phase`.

    Columns: KEYS[level], samples, tokens (scored, per target), score. level document needs `documents`.
    """
    if measure is Measure.relative:
        query.require_relative(phase.first, phase.last)
    only = next(iter(weights)) if len(weights) == 1 else None
    create_figures(query, level, phase, documents, only)
    table = pa.table(
        {
            "target": pa.array(weights.keys(), pa.string()),
            "weight": pa.array(weights.values(), pa.float64()),
        }
    )
    query.register("target_weights", table)
    keys = ", ".join(f"f.{key}" for key in KEYS[level])
    share = f"f.{measure.value}" + (" / f.tokens" if per is Per.token else "")
    kept = "WHERE f.tokens > 0" if per is Per.token else ""
    query.run("DROP TABLE IF EXISTS scores")
    query.run(
        f"CREATE TEMP TABLE scores AS SELECT {keys}, max(f.samples) AS samples, max(f.tokens) AS tokens, "
        f"sum(w.weight * {share}) AS score FROM figures f JOIN target_weights w ON f.target = w.target {kept} "
        f"GROUP BY {keys}"
    )
