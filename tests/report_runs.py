"""A run to report on: documents with addresses, and one whose text tries to become part of the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from inrun_megatron.data.corpora import write_corpus
from inrun_megatron.ledger import Ledger, LedgerWriter, StepRecord, commit, create_ledger
from inrun_megatron.report.page.losses import target_series
from tests.synthetic_ledger import DOMAINS, Shape, blended, description, write_run

HOSTILE = (
    '</script></details><script>document.title = "taken"</script><img src=x onerror="document.title=1">\u202e'
)
SHAPE = Shape(steps=60, batch=8)


def documents_of(domain: str, count: int = 12) -> list[dict[str, str]]:
    """Texts of about 130 bytes that name their domain and number."""
    return [
        {
            "text": f"{domain} document number {number}. " + f"{domain} text {number} goes on. " * 5,
            "source": f"{domain}/{number}",
            "url": f"https://example.org/{domain}/{number}" if number % 2 else "javascript:document.title=2",
        }
        for number in range(count)
    ]


def write_reported_run(directory: Path) -> np.ndarray:
    """A ledger in directory/shapley with its data in directory/data; the first document of `shuffled` is hostile.
    Returns its rows."""
    prefixes = []
    for domain in DOMAINS:
        documents = documents_of(domain)
        if domain == "shuffled":
            documents[0]["text"] = HOSTILE + documents[0]["text"]
            documents[0]["source"] = HOSTILE
        prefixes.append(write_corpus(directory / "data" / domain, documents))
    return write_run(directory / "shapley", SHAPE, description(blended(prefixes)))


def short_ledger(directory: Path, records: list[StepRecord], **shapley: Any) -> Ledger:
    """Of these step records, without values; shapley: settings of scoring."""
    scoring = {"estimator": "first_order", "interval": 1} | shapley
    with create_ledger(directory, description(shapley=scoring)):
        writer = LedgerWriter(directory, 0)
        for record in records:
            writer.append_step(record)
        commit(directory, records[-1].step, writer.write_parts(), "iter")
    return Ledger(directory)


def record(step: int, loss: float, value: float | None, status: str = "scored", **more: Any) -> StepRecord:
    """The same figures towards both targets; momentum grows with the step."""
    figures = None if value is None else [value, value]
    return StepRecord(
        step=step, status=status, target_loss=[loss, loss], sum_values=figures,
        momentum_term=None if value is None else [0.01 * step] * 2, decay_term=None if value is None else [-0.001] * 2,
        **more,
    )  # fmt: skip


def terms(ledger: Ledger) -> dict[str, list[float]]:
    """What is predicted towards code from each known loss to the next."""
    return {name: term.tolist() for name, term in target_series(ledger, ledger.steps(), "code").terms.items()}
