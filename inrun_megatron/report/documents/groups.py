"""Documents by what `inrun prepare` kept of them: their file, or a metadata field such as source, url or language."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from inrun_megatron.errors import UserError
from inrun_megatron.ledger.read import Ledger
from inrun_megatron.report.documents.lookup import Documents

NOT_GIVEN = "(none)"
"""The group of documents without a value for the field."""

_NO_FIELDS = ("document", "line", "tokens")  # columns of documents.parquet that are no property to group by


class Groups:
    """Which group of the field's values each document belongs to; a value has one group in all datasets.

    Raises UserError when no dataset of the run has the field.
    """

    def __init__(self, ledger: Ledger, documents: Documents, field: str) -> None:
        self._groups: list[np.ndarray] = []
        number: dict[str, int] = {}
        known: set[str] = set()
        found = False
        for index in range(len(ledger.datasets)):
            table = documents.resolver.documents(index)
            fields = set() if table is None else set(table.column_names) - set(_NO_FIELDS)
            known |= fields
            if table is not None and field in fields:
                found = True
                text = pc.fill_null(pc.cast(table[field], pa.string()), NOT_GIVEN).combine_chunks()
            else:
                count = documents.resolver.document_count(index)
                text = pa.repeat(NOT_GIVEN, count)
            encoded = pc.dictionary_encode(text)
            own = [number.setdefault(str(name), len(number)) for name in encoded.dictionary.to_pylist()]
            group = np.array(own, dtype=np.int64)[encoded.indices.to_numpy()]
            self._groups.append(group)
        if not found:
            offered = ", ".join(sorted(known)) or "none: they were not prepared by inrun prepare"
            raise UserError(
                f"no dataset of the run has the field {field!r} (fields: {offered}); keep it with "
                f"inrun prepare --metadata-fields {field}"
            )
        self._names = list(number)

    def of(self, dataset: int) -> np.ndarray:
        """Groups of a dataset's documents, in their order."""
        return np.asarray(self._groups[dataset])

    def names(self) -> pa.Table:
        """Columns grp, name."""
        return pa.table({"grp": pa.array(range(len(self._names)), pa.int64()), "name": self._names})
