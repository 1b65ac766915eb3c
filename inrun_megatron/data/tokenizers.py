"""Tokenizers: bytes, built in, and any Hugging Face tokenizer.json from disk.

A tokenizer here also answers what megatron-core's GPTDataset asks of one: `vocab_size`, `eod` and `unique_identifiers`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from inrun_megatron.data.indexed import IndexedFile, normalise_prefix
from inrun_megatron.errors import UserError
from inrun_megatron.ledger.files import sha256_of
from inrun_megatron.wording import one_line

EOD_TOKENS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "<|im_end|>",
    "<eod>",
    "[EOS]",
    "[SEP]",
)
"""Tokens taken for the end of a document, in this order, where none is named."""


class Tokenizer:
    """Text to token ids and back. `eod` is the id that ends a document."""

    name: str
    vocab_size: int
    eod: int
    path: str | None = None
    sha256: str | None = None

    @property
    def unique_identifiers(self) -> OrderedDict[str, Any]:
        """What GPTDataset puts into the key of its cached indices; free of paths, so that files may move."""
        return OrderedDict(
            {
                "class": type(self).__name__,
                "sha256": self.sha256,
                "vocab_size": self.vocab_size,
                "eod": self.eod,
            }
        )

    def describe(self) -> dict[str, Any]:
        """The record kept in PREFIX.json, from which `build_tokenizer_from` builds the tokenizer again."""
        return {
            "name": self.name,
            "path": self.path,
            "sha256": self.sha256,
            "vocab_size": self.vocab_size,
            "eod": self.eod,
        }

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, without an end-of-document token."""
        raise TypeError(
            f"the tokenizer {self.name!r} cannot encode text: it only states the vocabulary of given ids"
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of one text, without an end-of-document token."""
        return self.encode_batch([text])[0].tolist()

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of token ids; special tokens are left out, incomplete characters become U+FFFD."""
        raise TypeError(
            f"the tokenizer {self.name!r} cannot decode: it only states the vocabulary of given ids"
        )


class ByteTokenizer(Tokenizer):
    """One token per byte of UTF-8 (0 to 255) and 256 for the end of a document."""

    name = "bytes"
    vocab_size = 257
    eod = 256

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        array = np.asarray(ids)
        return (
            array[(array >= 0) & (array < 256)].astype(np.uint8).tobytes().decode("utf-8", errors="replace")
        )


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json, read by the `tokenizers` library. No special tokens are added to a text.

    `eod` is the text or the id of the token that ends a document; without it the first of `EOD_TOKENS` in the vocabulary
    is taken. Raises UserError when the file is missing or no tokenizer, or has no such token.
    """

    def __init__(self, path: str | Path, eod: str | int | None = None) -> None:
        from tokenizers import Tokenizer as FastTokenizer

        file = _tokenizer_file(path)
        try:
            self._fast = FastTokenizer.from_file(str(file))
        except Exception as error:  # the library raises a bare Exception for anything it cannot parse
            reason = one_line(error)
            raise UserError(f"{file} is no Hugging Face tokenizer.json that can be read ({reason})") from None
        vocabulary: dict[str, int] = self._fast.get_vocab(with_added_tokens=True)
        self.path = str(file.absolute())
        self.name = Path(self.path).parent.name if file.name == "tokenizer.json" else file.stem
        self.sha256 = sha256_of(file)
        # ids may have holes, so the size of the embedding follows from the largest id and not from the count
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        if isinstance(eod, int):
            if not 0 <= eod < self.vocab_size:
                raise UserError(f"{file} has {self.vocab_size} tokens and none with the id {eod}")
            self.eod = eod
            return
        names = EOD_TOKENS if eod is None else (eod,)
        found = [token for token in names if token in vocabulary]
        if not found:
            raise UserError(
                f"{file} has no token {' or '.join(map(repr, names))}: name the one that ends a document with "
                "--eod-token"
            )
        self.eod = vocabulary[found[0]]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._fast.encode_batch(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int64) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._fast.decode([int(i) for i in ids], skip_special_tokens=True)


def _tokenizer_file(path: str | Path) -> Path:
    file = Path(path)
    if file.is_dir():
        file = file / "tokenizer.json"
    if not file.is_file():
        raise UserError(
            f"tokenizer {str(path)!r} is neither 'bytes' nor an existing tokenizer.json: give the path of the file"
        )
    return file


class NullTokenizer(Tokenizer):
    """States the vocabulary of data that was tokenized elsewhere; neither encodes nor decodes."""

    name = "null"

    def __init__(self, vocab_size: int, eod: int | None = None) -> None:
        self.vocab_size = vocab_size
        self.eod = vocab_size - 1 if eod is None else eod
        if not 0 <= self.eod < vocab_size:
            raise UserError(f"the end-of-document token {self.eod} is outside the vocabulary of {vocab_size}")


def build_tokenizer(spec: str | Path = "bytes", eod_token: str | None = None) -> Tokenizer:
    """`bytes`, or the path of a tokenizer.json (or of the directory that holds one)."""
    if str(spec) == "bytes":
        if eod_token is not None:
            raise UserError(
                f"--eod-token {eod_token!r} has no effect with the tokenizer 'bytes': leave it out"
            )
        return ByteTokenizer()
    return HuggingFaceTokenizer(spec, eod_token)


def build_tokenizer_from(record: dict[str, Any]) -> Tokenizer:
    """The tokenizer that `Tokenizer.describe` recorded. UserError when its file has gone or changed."""
    if record.get("name") == "bytes":
        return ByteTokenizer()
    path = record.get("path")
    if path is None:
        return NullTokenizer(int(record["vocab_size"]), record.get("eod"))
    tokenizer = HuggingFaceTokenizer(path, record.get("eod"))
    if record.get("sha256") not in (None, tokenizer.sha256):
        raise UserError(
            f"{path} has changed since the data was prepared (sha256 {str(record['sha256'])[:12]}, now "
            f"{str(tokenizer.sha256)[:12]}): restore it, or prepare the data again"
        )
    return tokenizer


def tokenizer_for_data(path: str | Path, prefixes: Sequence[str | Path]) -> Tokenizer:
    """The tokenizer.json `path` with the end of document that datasets were prepared with, where it made any of them.

    Raises UserError when they were prepared with different ones: `inrun prepare --eod-token` may name any token.
    """
    from inrun_megatron.data.documents import read_summary

    sha256 = sha256_of(_tokenizer_file(path))
    ends: dict[int, str] = {}
    for prefix in map(normalise_prefix, prefixes):
        record = (read_summary(prefix) or {}).get("tokenizer", {})
        if record.get("sha256") == sha256 and record.get("eod") is not None:
            ends.setdefault(int(record["eod"]), prefix)
    if len(ends) > 1:
        (one, first), (other, second) = list(ends.items())[:2]
        raise UserError(
            f"{first} was prepared with the end-of-document token {one} and {second} with {other}: prepare both with the "
            "same --eod-token"
        )
    return HuggingFaceTokenizer(path, next(iter(ends), None))


def prepared_tokenizer(prefixes: Sequence[str | Path]) -> Tokenizer:
    """The tokenizer that all of these datasets were prepared with, from their PREFIX.json.

    Raises UserError when one has no PREFIX.json or they were prepared with different tokenizers.
    """
    from inrun_megatron.data.documents import read_summary

    first: tuple[str, dict[str, Any]] | None = None
    for prefix in map(normalise_prefix, prefixes):
        summary = read_summary(prefix)
        if summary is None:
            IndexedFile(prefix)  # that the dataset does not exist is the better message
            raise UserError(
                f"{prefix}.json does not exist, so the tokenizer of {prefix} is not known: name it "
                "(--tokenizer-type, --vocab-size)"
            )
        record = summary["tokenizer"]
        if first is None:
            first = (prefix, record)
        elif any(record.get(key) != first[1].get(key) for key in ("sha256", "vocab_size", "eod")):
            raise UserError(
                f"{first[0]} was prepared with the tokenizer {_in_words(first[1])} and {prefix} with "
                f"{_in_words(record)}: prepare both with the same one"
            )
    if first is None:
        raise UserError("no dataset is given")
    return build_tokenizer_from(first[1])


def _in_words(record: dict[str, Any]) -> str:
    return f"{record.get('name')!r} ({record.get('vocab_size')} tokens)"
