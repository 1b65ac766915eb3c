"""Which documents to keep, and how to weigh the datasets: the rules of `inrun curate`, on plain arrays.

Only documents of the run's training split are candidates. A document with less evidence than asked for is not judged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from math import exp
from typing import Any

import numpy as np

from inrun_megatron.errors import UserError

KEPT, HELD_OUT, UNJUDGED, NEGATIVE, BOTTOM = range(5)
REASONS = ("kept", "held out", "too little evidence", "negative", "lowest scores")
"""What became of a document, by its code."""

# Percentages meet rounding: 29% of 100 is 28.999999999999996 in binary.
_SLACK = 1e-9


class Unit(StrEnum):
    """What percentages count."""

    documents = "documents"
    tokens = "tokens"


class Blend(StrEnum):
    """How datasets are weighed afterwards.

    tokens: each as before times the share of its tokens that is left, so that what is left is seen as often as before.
    keep: as before, so that what is left of a thinned dataset is seen more often. value: tokens, times exp(strength x
    value), where value is the dataset's score over the largest of all datasets.
    """

    tokens = "tokens"
    keep = "keep"
    value = "value"


@dataclass(frozen=True)
class Rules:
    """What goes. Rules add up: a document goes if one of them says so.

    drop_negative: scores below 0. drop_bottom: the lowest so many per cent. keep_top: all but the highest so many per
    cent. per_dataset: percentages within each dataset instead of over all. minimum_samples: a document that fewer scored
    samples contain is not judged; drop_unjudged: it goes. strength, smoothing: of Blend.value; smoothing is the share of
    the blend that stays as under Blend.tokens.
    """

    drop_negative: bool = False
    drop_bottom: float | None = None
    keep_top: float | None = None
    unit: Unit = Unit.documents
    per_dataset: bool = False
    minimum_samples: int = 1
    drop_unjudged: bool = False
    blend: Blend = Blend.tokens
    strength: float = 1.0
    smoothing: float = 0.1

    def __post_init__(self) -> None:
        for name, percent in (("drop-bottom", self.drop_bottom), ("keep-top", self.keep_top)):
            if percent is not None and not 0 < percent < 100:
                raise UserError(f"--{name} {percent:g} is no percentage; give a number between 0 and 100")
        if self.drop_bottom is not None and self.keep_top is not None:
            raise UserError(
                f"--drop-bottom {self.drop_bottom:g} and --keep-top {self.keep_top:g} both set a threshold; give one"
            )
        if self.minimum_samples < 1:
            raise UserError(f"--min-samples {self.minimum_samples} is no evidence; give 1 or more")
        if not 0 <= self.smoothing <= 1:
            raise UserError(f"--smoothing {self.smoothing:g} is no share; give a number from 0 to 1")
        if not abs(self.strength) <= 100:
            raise UserError(
                f"--strength {self.strength:g} is out of range; give a number up to 100, such as 1"
            )
        if not self.drops and self.blend is not Blend.value:
            raise UserError(
                "no rule is given: use --drop-negative, --drop-bottom P, --keep-top P, --drop-unjudged or --blend value"
            )

    @property
    def drops(self) -> bool:
        """Whether a rule can drop documents."""
        return (
            self.drop_negative
            or self.drop_unjudged
            or self.drop_bottom is not None
            or self.keep_top is not None
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {
            name: str(value) if isinstance(value, StrEnum) else value for name, value in vars(self).items()
        }


@dataclass
class Candidates:
    """The documents of one dataset; arrays [documents].

    tokens: length of each document. train: in the run's training split. score: NaN where a document has no scored
    sample; samples: scored samples that contain it. weight: the dataset's in the run's blend; None in a plain list,
    where its training tokens stand in.
    """

    name: str
    tokens: np.ndarray
    train: np.ndarray
    score: np.ndarray
    samples: np.ndarray
    weight: float | None
    fate: np.ndarray = field(init=False)
    """Code of REASONS; set by `decide`."""

    def __post_init__(self) -> None:
        self.fate = np.zeros(len(self.tokens), np.int8)

    @property
    def kept(self) -> np.ndarray:
        return self.fate == KEPT

    @property
    def judged(self) -> np.ndarray:
        """Documents with enough evidence; known after `decide`."""
        return self._judged

    def judge(self, minimum_samples: int) -> None:
        self._judged = self.train & np.isfinite(self.score) & (self.samples >= minimum_samples)


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


def mean_score(data: Candidates, chosen: np.ndarray) -> float | None:
    """Mean score of the judged documents in `chosen`, weighed by their tokens; None without any."""
    own = data.judged & chosen
    tokens = data.tokens[own].sum()
    return float((data.score[own] * data.tokens[own]).sum() / tokens) if tokens else None


def blend_weights(datasets: Sequence[Candidates], rules: Rules) -> tuple[list[float], list[float]]:
    """Weight of each dataset in the blend before and after, each summing to 1; 0 for a dataset with nothing left.

    Blend.value moves weights as DoGE does (arXiv 2310.15393: multiplicative weights on how well a domain's gradient
    agrees with the target's), with the values of the run in place of a proxy model's.
    """
    whole = [data.tokens[data.train].sum() for data in datasets]
    given = [data.weight for data in datasets]
    base = (
        whole
        if any(weight is None for weight in given)
        else [float(weight) for weight in given if weight is not None]
    )
    left = [float(data.tokens[data.kept].sum()) for data in datasets]
    if rules.blend is Blend.keep:
        after = [weight if tokens else 0.0 for weight, tokens in zip(base, left, strict=True)]
        return _shares(base), _shares(after)
    after = _shares([w * own / max(all_, 1) for w, own, all_ in zip(base, left, whole, strict=True)])
    if rules.blend is Blend.value:
        values = [mean_score(data, data.kept) for data in datasets]
        if all(value is None for value in values):
            raise UserError("no kept document has a value to weigh datasets by; use --blend tokens or keep")
        largest = max(abs(value) for value in values if value is not None) or 1.0
        gains = [exp(rules.strength * (value or 0.0) / largest) for value in values]
        moved = _shares([weight * gain for weight, gain in zip(after, gains, strict=True)])
        after = [
            rules.smoothing * old + (1 - rules.smoothing) * new for old, new in zip(after, moved, strict=True)
        ]
    return _shares(base), after


def _shares(weights: Sequence[float]) -> list[float]:
    total = float(sum(weights))
    return [float(weight) / total for weight in weights]


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
        "score_before": mean_score(data, train),
        "score_after": mean_score(data, kept),
        "weight_before": before,
        "weight_after": after,
    }
