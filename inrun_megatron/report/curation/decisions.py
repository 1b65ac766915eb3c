"""Which documents to keep: the rules applied, on plain arrays.

Only documents of the run's training split are candidates. A document with less evidence than asked for is not judged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from inrun_megatron.errors import UserError
from inrun_megatron.report.curation.candidates import (
    BOTTOM,
    HELD_OUT,
    NEGATIVE,
    REASONS,
    UNJUDGED,
    Candidates,
)
from inrun_megatron.report.curation.rules import Rules, Unit

# Percentages meet rounding: 29% of 100 is 28.999999999999996 in binary.
_SLACK = 1e-9


def decide(datasets: Sequence[Candidates], rules: Rules) -> None:
    """Set `fate` of every document.

    A document that several rules drop has the first reason of: held out, too little evidence, negative, lowest scores.
    Ties at a threshold go in the order of datasets and documents. Raises UserError when nothing would be left.
    """
    for data in datasets:
        data.judge(rules.minimum_samples)
        data.fate[~data.train] = HELD_OUT
        if rules.drop_unjudged:
            data.fate[data.train & ~data.judged] = UNJUDGED
    if rules.drop_bottom is not None or rules.keep_top is not None:
        share = (rules.drop_bottom if rules.drop_bottom is not None else 100 - (rules.keep_top or 0)) / 100
        for group in [[data] for data in datasets] if rules.per_dataset else [list(datasets)]:
            _drop_lowest(group, share, rules.unit)
    if rules.drop_negative:
        for data in datasets:
            data.fate[data.judged & (data.score < 0)] = NEGATIVE
    if not any(data.kept.any() for data in datasets):
        raise UserError(
            "these rules leave no document; loosen them (a smaller --drop-bottom, --min-samples, another --phase)"
        )


def _drop_lowest(datasets: Sequence[Candidates], share: float, unit: Unit) -> None:
    """Drop the judged documents with the lowest scores, up to `share` of them or of their tokens."""
    scores = np.concatenate([data.score[data.judged] for data in datasets])
    sizes = [data.tokens[data.judged] for data in datasets]
    amount = np.concatenate(sizes).astype(np.float64) if unit is Unit.tokens else np.ones(len(scores))
    order = np.argsort(scores, kind="stable")
    within = np.cumsum(amount[order]) <= share * amount.sum() * (1 + _SLACK)
    dropped = np.zeros(len(scores), bool)
    dropped[order[within]] = True
    ends = np.cumsum([len(size) for size in sizes])
    for data, own in zip(datasets, np.split(dropped, ends[:-1]), strict=True):
        data.fate[np.flatnonzero(data.judged)[own]] = BOTTOM


def domain_record(data: Candidates, before: float, after: float) -> dict[str, Any]:
    """What became of one dataset, JSON-serialisable."""
    train, kept = data.train, data.kept
    dropped: Mapping[str, dict[str, int]] = {
        REASONS[code]: {
            "documents": int((data.fate == code).sum()),
            "tokens": int(data.tokens[data.fate == code].sum()),
        }
        for code in (UNJUDGED, NEGATIVE, BOTTOM)
    }
    return {
        "name": data.name,
        "documents": int(train.sum()),
        "tokens": int(data.tokens[train].sum()),
        "judged": int(data.judged.sum()),
        "held_out": int((~train).sum()),
        "kept_documents": int(kept.sum()),
        "kept_tokens": int(data.tokens[kept].sum()),
        "dropped": dropped,
        "score_before": data.mean_score(train),
        "score_after": data.mean_score(kept),
        "weight_before": before,
        "weight_after": after,
    }
