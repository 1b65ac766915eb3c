"""Corpora from texts in memory, for tests, examples and the demo: real datasets, written by `prepare`."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from inrun_megatron.data.prepare import prepare

WORDS = """the a model learns from what it reads and every sample moves its weights a little towards or away from
a target value of data step batch token loss gradient layer rank shard ledger"""


def write_corpus(
    prefix: str | Path,
    documents: Sequence[str | Mapping[str, Any]],
    tokenizer: str | Path = "bytes",
    **options: Any,
) -> str:
    """Write `documents` to PREFIX.jsonl and prepare them.

    They are texts, or records with `text` and metadata fields, all of which are kept. `options` go to `prepare`. An
    existing dataset is replaced. Returns the prefix.
    """
    records = [{"text": document} if isinstance(document, str) else dict(document) for document in documents]
    keep = list(dict.fromkeys(name for record in records for name in record if name != "text"))
    source = Path(f"{prefix}.jsonl")
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return prepare([source], prefix, tokenizer=tokenizer, keep=keep, overwrite=True, **options).prefix


def tiny_corpus(
    prefix: str | Path,
    *,
    documents: int = 40,
    words: int = 30,
    seed: int = 0,
    domain: str = "tiny",
    tokenizer: str | Path = "bytes",
    **options: Any,
) -> str:
    """Random sentences: `documents` of 1 to 2 x `words` words, with the metadata fields source and domain.

    About 5 x words byte tokens per document. The same arguments give the same files. `options` go to
    `prepare`. Returns the prefix.
    """
    generator = random.Random(f"{seed} {domain}")
    vocabulary = WORDS.split()
    records = [
        {
            "text": " ".join(generator.choices(vocabulary, k=generator.randint(1, 2 * words))) + ".\n",
            "source": f"{domain}/{document}",
            "domain": domain,
        }
        for document in range(documents)
    ]
    return write_corpus(prefix, records, tokenizer, **options)
