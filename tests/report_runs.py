"""A run to report on: documents with addresses, and one whose text tries to become part of the page."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from inrun_megatron.data.corpora import write_corpus
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
