"""Where the documents of a curated dataset come from: the number that each had in the dataset it was first prepared as.

`inrun curate` writes it beside the data (curation.json, keep_list.parquet), through any number of curations. Two runs
share a document when its dataset has the same origin and the document the same number in it, whatever the order in which
they read it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from inrun_megatron.data.documents import read_table
from inrun_megatron.data.indexed import IndexedFile
from inrun_megatron.errors import UserError
from inrun_megatron.ledger.files import digest_of, read_json

CURATION_FILE = "curation.json"
KEEP_LIST_FILE = "keep_list.parquet"


@dataclass(frozen=True)
class Origin:
    """idx_sha256, bin_digest: of the dataset that documents were first prepared as; bin_digest None where an older curation
    did not note it. numbers [documents]: theirs in it; None where the dataset is that one itself."""

    idx_sha256: str
    bin_digest: str | None
    numbers: np.ndarray | None = None

    def documents(self, documents: np.ndarray) -> np.ndarray:
        """Original numbers of these documents."""
        return documents if self.numbers is None else self.numbers[documents]


def origin_of(data: IndexedFile, idx_sha256: str) -> Origin:
    """The origin of a dataset; the dataset itself where no curation wrote it."""
    prefix, itself = Path(data.prefix), Origin(idx_sha256, digest_of(data.bin_path))
    path = prefix.parent / CURATION_FILE
    if not path.is_file():
        return itself
    datasets = read_json(path).get("datasets", [])  # none in somebody else's file of that name
    rows = [row for row in datasets if row["rewritten"] and row["file"] == prefix.name]
    if not rows:
        return itself
    table = read_table(
        prefix.parent / KEEP_LIST_FILE,
        columns=["new_document", "origin_document"],
        filters=(pc.field("dataset") == rows[0]["name"]) & pc.field("kept"),
    )
    numbers = np.empty(table.num_rows, np.int64)
    numbers[table["new_document"].to_numpy()] = table["origin_document"].to_numpy()
    if len(numbers) != data.num_documents:
        raise UserError(
            f"{prefix.parent / KEEP_LIST_FILE} keeps {len(numbers)} documents of {rows[0]['name']}, "
            f"{data.idx_path} has {data.num_documents}: they are not of one curation; run inrun curate again"
        )
    return Origin(str(rows[0]["origin_idx_sha256"]), rows[0].get("origin_bin_digest"), numbers)
