"""`--data-path` and `--split` as numbers, and the checks of a dataset against them and against the vocabulary."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from inrun_megatron.data.documents import read_summary
from inrun_megatron.data.indexed import IndexedFile, normalise_prefix
from inrun_megatron.data.megatron import helpers
from inrun_megatron.data.tokenizers import Tokenizer
from inrun_megatron.errors import UserError

SPLITS = ("train", "valid", "test")
_DEFAULT_SURPLUS = 0.005  # BlendedMegatronDatasetConfig.mid_level_dataset_surplus


@dataclass(frozen=True)
class Blend:
    """Datasets and how they are mixed. `weights` is None for a plain list, else one positive number per prefix."""

    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None


def parse_blend(data_path: Sequence[str]) -> Blend:
    """Megatron's `--data-path`: prefixes, or a weight before each prefix (`0.7 a_document 0.3 b_document`).

    As in megatron/core/datasets/utils.py `get_blend_from_list`, but what cannot be meant is an error. A path that is a
    number can be written as `./5`.
    """
    items = [str(item).strip() for item in data_path]
    if not items or not all(items):
        raise UserError("--data-path is empty: give the prefix of a .bin/.idx pair")
    numbers = [_number(item) for item in items]
    if all(number is None for number in numbers):
        return Blend(tuple(map(normalise_prefix, items)), None)
    given = " ".join(items)
    weights = [number for number in numbers[::2] if number is not None]
    if (
        len(items) % 2
        or len(weights) != len(items) // 2
        or any(number is not None for number in numbers[1::2])
    ):
        raise UserError(
            f"--data-path {given}: weights and prefixes must come in turn (0.7 a_document 0.3 b_document), or prefixes alone"
        )
    for weight, prefix in zip(weights, items[1::2], strict=True):
        if not (math.isfinite(weight) and weight > 0):
            raise UserError(
                f"--data-path {given}: the weight {weight:g} of {prefix} must be a positive number"
            )
    prefixes = tuple(map(normalise_prefix, items[1::2]))
    # the weight of one alone says nothing
    return Blend(prefixes, tuple(weights) if len(prefixes) > 1 else None)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def parse_split(split: str) -> tuple[float, float, float]:
    """Megatron's `--split` ("969,30,1") as shares of the documents for training, validation and test that sum to 1."""
    parts = split.split(",")
    # plain decimals only: megatron-core reads the digits out of anything, "1e3" as 1 and 3
    shares = [float(part) for part in parts if re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*", part)]
    if len(shares) != len(parts) or len(shares) > len(SPLITS) or sum(shares) <= 0:
        raise UserError(f"--split {split!r}: give up to three shares that are not negative, such as 969,30,1")
    if shares[0] <= 0:
        raise UserError(f"--split {split!r} leaves nothing for training: its first share must be positive")
    total = sum(shares)
    train, valid, test = (*(share / total for share in shares), *(0.0,) * (len(SPLITS) - len(shares)))
    return train, valid, test


def split_range(span: Sequence[float], sequences: int) -> range:
    """The sequences of a split, for its bounds as shares: the rounding is that of BlendedMegatronDatasetBuilder."""
    return range(round(span[0] * float(sequences)), round(span[1] * float(sequences)))


def dataset_names(prefixes: Sequence[str]) -> list[str]:
    """A short unique name per prefix: its last path component, with as many parents as it takes, then a number."""
    parts = [Path(prefix).parts for prefix in prefixes]
    names = []
    for own in parts:
        depth = 1
        while depth < len(own) and any(other != own and other[-depth:] == own[-depth:] for other in parts):
            depth += 1
        names.append("/".join(own[-depth:]))
    return [
        name if names[:position].count(name) == 0 else f"{name}#{names[:position].count(name) + 1}"
        for position, name in enumerate(names)
    ]


def check_vocabulary(data: IndexedFile, tokenizer: Tokenizer) -> None:
    """The data's tokens are the tokenizer's: by PREFIX.json where there is one, and by the tokens themselves.

    Raises UserError naming both vocabularies.
    """
    check_tokenizer(data.prefix, data, tokenizer)
    check_token_range(data.prefix, *data.token_range(), tokenizer.vocab_size)


def check_tokenizer(where: str, data: IndexedFile, tokenizer: Tokenizer) -> None:
    """UserError when PREFIX.json names another tokenizer or end of document than the run's. `where` names the data."""
    summary = read_summary(data.prefix)
    if summary is None or tokenizer.name == "null":
        return
    record = summary["tokenizer"]
    if record["vocab_size"] != tokenizer.vocab_size or record.get("sha256") != tokenizer.sha256:
        raise UserError(
            f"{where} was prepared with the tokenizer {record.get('name')!r} ({record['vocab_size']} tokens), "
            f"the run uses {tokenizer.name!r} ({tokenizer.vocab_size} tokens): use the same tokenizer for both"
        )
    if record.get("eod") not in (None, tokenizer.eod):
        raise UserError(
            f"{where} was prepared with the end-of-document token {record['eod']}, the run uses {tokenizer.eod}: prepare "
            "all data with the same --eod-token"
        )


def check_token_range(where: str, smallest: int, largest: int, vocab_size: int) -> None:
    """UserError when tokens lie outside [0, vocab_size)."""
    if smallest < 0 or largest >= vocab_size:
        bad = smallest if smallest < 0 else largest
        raise UserError(
            f"{where} holds the token {bad}, outside the vocabulary of {vocab_size}: use the tokenizer (or --vocab-size) "
            "that the data was prepared with"
        )


def check_split(
    data: IndexedFile, split: str, spans: Sequence[Sequence[float] | None], whole_epochs: int | None
) -> None:
    """Each wanted split of a dataset has tokens. UserError otherwise, where GPTDataset would count epochs for ever.

    `spans`: bounds of training and validation as shares, None for a split that is not wanted. `whole_epochs`: the
    sequence length where the data is read exactly once (a list of prefixes without weights), so that one epoch must
    hold a sample; else None.
    """
    for name, span in zip(SPLITS, spans, strict=False):
        if span is None:
            continue
        chosen = split_range(span, data.num_sequences)
        tokens = int(data.sequence_lengths[chosen.start : chosen.stop].sum(dtype=np.int64))
        if tokens <= 1:
            without = "" if name == "train" else ", or train without evaluation (--eval-iters 0)"
            raise UserError(
                f"--split {split} leaves {tokens} tokens of {data.prefix} ({data.num_sequences} documents) for {name}: "
                f"change --split or add documents{without}"
            )
        if whole_epochs is not None and tokens <= whole_epochs:
            raise UserError(
                f"--split {split} leaves {tokens} tokens of {data.prefix} for {name}, fewer than one sample of "
                f"{whole_epochs} + 1: leave the dataset out, change --split, or give weights in --data-path to repeat it"
            )


def choose_surplus(
    weights: Sequence[float], sizes: Sequence[int], epoch_tokens: Sequence[Sequence[int]], seq_length: int
) -> float:
    """The surplus with which BlendedMegatronDatasetBuilder can fill a weighted blend: its default where that suffices.

    BlendedDataset deals samples to the dataset that lags most behind its weight, which may take a few more from one than
    were built for it; the builder then fails on rank 0 while the other ranks wait. Its remedy, a larger surplus, is
    found here beforehand.

    Args:
        weights: one per dataset, positive.
        sizes: samples asked for, per split.
        epoch_tokens: tokens of one epoch, per split and dataset.
        seq_length: tokens per sample.
    """
    shares = np.asarray(weights, np.float64) / np.sum(weights)
    surplus = _DEFAULT_SURPLUS
    for size, tokens in zip(sizes, epoch_tokens, strict=True):
        asked = np.ceil(size * shares)
        total = int(asked.sum())
        datasets, samples = np.zeros(total, np.int16), np.zeros(total, np.int64)
        helpers.build_blending_indices(datasets, samples, shares.tolist(), len(shares), total, False)
        dealt = np.bincount(datasets, minlength=len(shares))
        while True:
            built = np.ceil(asked * (1 + surplus))
            epochs = np.maximum(np.ceil((built * seq_length + 1) / np.asarray(tokens)), 1)
            if np.all((epochs * tokens - 1) // seq_length >= dealt):
                break
            surplus *= 2
    return surplus
