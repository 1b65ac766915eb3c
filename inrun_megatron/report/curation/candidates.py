"""The documents that a run read, with their scores: what curation chooses from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from inrun_megatron.data.filtered import document_lengths
from inrun_megatron.report.documents.lookup import Documents
from inrun_megatron.report.query import Query
from inrun_megatron.report.values.sources import with_text

KEPT, HELD_OUT, UNJUDGED, NEGATIVE, BOTTOM = range(5)
REASONS = ("kept", "held out", "too little evidence", "negative", "lowest scores")
"""What became of a document, by its code."""


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

    def mean_score(self, chosen: np.ndarray) -> float | None:
        """Mean score of the judged documents in `chosen`, weighed by their tokens; None without any."""
        own = self.judged & chosen
        tokens = self.tokens[own].sum()
        return float((self.score[own] * self.tokens[own]).sum() / tokens) if tokens else None


def read_candidates(query: Query, documents: Documents) -> list[Candidates]:
    """The documents of every dataset of the run, with the scores of the relation `scores` (by document).

    Raises UserError when data files are missing or have changed.
    """
    found = []
    for index, description in enumerate(query.ledger.datasets):
        tokens = document_lengths(documents.resolver.file(index))
        rows = query.table(f"SELECT document, samples, score FROM scores WHERE dataset = {index}")
        place = rows["document"].to_numpy()
        score, samples = np.full(len(tokens), np.nan), np.zeros(len(tokens), np.int64)
        score[place], samples[place] = rows["score"].to_numpy(), rows["samples"].to_numpy()
        train = np.zeros(len(tokens), bool)
        chosen = documents.resolver.training_documents(index)
        train[chosen.start : chosen.stop] = True
        name = query.ledger.dataset_names[index]
        found.append(Candidates(name, tokens, train, score, samples, description.get("weight")))
    return found


def lowest(
    documents: Documents, datasets: Sequence[Candidates], index: int, chosen: np.ndarray, n: int
) -> list[dict[str, Any]]:
    """The n documents of `chosen` with the lowest scores, with source and text."""
    data = datasets[index]
    places = np.flatnonzero(chosen)
    order = places[np.argsort(data.score[places], kind="stable")][:n]
    return [
        with_text(
            documents,
            {
                "dataset": index,
                "document": int(place),
                "reason": REASONS[data.fate[place]],
                "score": float(data.score[place]),
                "samples": int(data.samples[place]),
                "tokens": int(data.tokens[place]),
            },
        )
        for place in order
    ]
