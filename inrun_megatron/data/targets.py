"""Validation targets: fixed sequences whose mean token loss L_k the values are about."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from inrun_megatron.data.blend import check_token_range, check_tokenizer
from inrun_megatron.data.indexed import IndexedFile, normalise_prefix
from inrun_megatron.data.megatron import document_ids, masks_and_positions
from inrun_megatron.data.tokenizers import Tokenizer
from inrun_megatron.errors import UserError
from inrun_megatron.ledger.files import sha256_of

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class TargetSpec:
    """What `--shapley-target NAME=PATH[:SEQUENCES]` says. `sequences` None: all that the data holds."""

    name: str
    path: str
    sequences: int | None = None


def parse_target(text: str) -> TargetSpec:
    """`NAME=PATH[:SEQUENCES]`. PATH is the prefix of a .bin/.idx pair."""
    name, separator, path = text.partition("=")
    if not separator or not path or not _NAME.fullmatch(name):
        raise UserError(
            f"--shapley-target {text!r}: expected NAME=PATH[:SEQUENCES] with a NAME of letters, digits, '.', '_' and '-'"
        )
    head, colon, count = path.rpartition(":")
    if not colon or "/" in count:
        return TargetSpec(name, normalise_prefix(path))
    if not head or not count.isdecimal() or int(count) == 0:
        raise UserError(
            f"--shapley-target {text!r}: SEQUENCES must be a positive whole number, not {count!r}"
        )
    return TargetSpec(name, normalise_prefix(head), int(count))


def parse_targets(texts: Sequence[str]) -> list[TargetSpec]:
    """`parse_target` of each; UserError when a name comes twice."""
    specs = [parse_target(text) for text in texts]
    for position, spec in enumerate(specs):
        if any(spec.name == other.name for other in specs[:position]):
            raise UserError(
                f"--shapley-target {spec.name} is given twice: each target needs a name of its own"
            )
    return specs


@dataclass(frozen=True)
class Target:
    """n validation sequences of length s."""

    name: str
    tokens: torch.Tensor
    """[n, s + 1] int64: inputs are the first s, labels the last s."""
    loss_mask: torch.Tensor
    """[n, s] float32."""
    position_ids: torch.Tensor
    """[n, s] int64."""
    description: dict[str, Any]
    """JSON-serialisable: name, path, idx_sha256, tokens_sha256, sequences (n), seq_length (s), available, loss_tokens, settings."""
    documents: torch.Tensor | None = None
    """[n, s] int64, where the attention is cut at documents: the number of each token's document in its row."""

    @cached_property
    def num_tokens(self) -> float:
        """Loss tokens over all sequences: the denominator of L_k."""
        return float(self.loss_mask.sum(dtype=torch.float64))

    def microbatches(
        self, micro_batch_size: int, rank: int = 0, world: int = 1, *, full_size: bool = False
    ) -> list[dict[str, torch.Tensor]]:
        """The share of data-parallel rank `rank` of `world`: dicts of tokens, labels, loss_mask, position_ids [b, s],
        and documents [b, s] where the attention is cut.

        Sequence i goes to rank i mod world. Every rank gets the same number of microbatches of the same shape; rows that
        only fill them up have loss_mask 0. b is at most `micro_batch_size`, chosen so that few such rows are needed; it is
        exactly `micro_batch_size` with `full_size` (a pipeline wants one shape for all its microbatches).
        """
        assert micro_batch_size > 0 and 0 <= rank < world
        per_rank = -(-len(self.tokens) // world)
        count = -(-per_rank // micro_batch_size)
        rows = micro_batch_size if full_size else -(-per_rank // count)
        return [self._rows(rank + world * rows * first, world, rows) for first in range(count)]

    def _rows(self, start: int, step: int, rows: int) -> dict[str, torch.Tensor]:
        """`rows` sequences start, start + step, ...; past the last sequence rows of zeros."""
        chosen = torch.arange(start, start + step * rows, step)
        missing = chosen >= len(self.tokens)
        chosen[missing] = 0
        tokens, loss_mask = self.tokens[chosen], self.loss_mask[chosen]
        tokens[missing] = 0
        loss_mask[missing] = 0.0
        return {
            "tokens": tokens[:, :-1].contiguous(),
            "labels": tokens[:, 1:].contiguous(),
            "loss_mask": loss_mask,
            "position_ids": self.position_ids[chosen],
        } | ({} if self.documents is None else {"documents": self.documents[chosen]})


def load_target(
    spec: TargetSpec,
    *,
    seq_length: int,
    tokenizer: Tokenizer,
    eod_mask_loss: bool,
    reset_position_ids: bool = False,
    reset_attention_mask: bool = False,
) -> Target:
    """Cut the target's documents, as one stream in file order, into sequences of `seq_length`.

    Sequence i reads the seq_length + 1 tokens from i * seq_length on, so that each token but the first is a label once.
    Where the spec asks for fewer sequences than there are, they are spread evenly over the file. Masks and positions
    follow the rules of the training data (GPTDataset).

    Raises UserError: missing or truncated files, data of another tokenizer, fewer tokens than one sequence, more sequences
    asked for than there are, a token outside the vocabulary, no token with a loss.
    """
    data = IndexedFile(spec.path)
    where = f"target {spec.name} ({data.prefix})"
    check_tokenizer(where, data, tokenizer)
    available = (data.num_tokens - 1) // seq_length
    if available < 1:
        raise UserError(
            f"{where} has {data.num_tokens} tokens, fewer than one sequence of {seq_length} + 1: add documents or lower "
            "--seq-length"
        )
    count = available if spec.sequences is None else spec.sequences
    if count > available:
        raise UserError(
            f"{where} holds {available} sequences of {seq_length} tokens, not {count}: ask for at most {available}, or "
            "leave the number out"
        )
    starts = np.arange(count) * available // count * seq_length
    tokens = torch.from_numpy(
        np.stack([data.tokens(i, i + seq_length + 1) for i in starts.tolist()]).astype(np.int64)
    )
    check_token_range(where, int(tokens.min()), int(tokens.max()), tokenizer.vocab_size)
    rows = [masks_and_positions(row[:-1], tokenizer.eod, reset_position_ids, eod_mask_loss) for row in tokens]
    loss_mask = torch.stack([mask for mask, _ in rows])
    if not loss_mask.any():
        raise UserError(
            f"{where} has no token with a loss: every one follows an end of document (--eod-mask-loss)"
        )
    description = {
        "name": spec.name,
        "path": str(Path(data.prefix).absolute()),
        "idx_sha256": sha256_of(data.idx_path),
        "tokens_sha256": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
        "sequences": count,
        "seq_length": seq_length,
        "available": available,
        "loss_tokens": int(loss_mask.sum()),
        "eod_mask_loss": eod_mask_loss,
        "reset_position_ids": reset_position_ids,
        "reset_attention_mask": reset_attention_mask,
    }
    return Target(
        spec.name,
        tokens,
        loss_mask,
        torch.stack([positions for _, positions in rows]),
        description,
        documents=document_ids(tokens[:, :-1], tokenizer.eod) if reset_attention_mask else None,
    )
