"""Tokenization of pieces, in this process or in several, with the results in the order of the pieces."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from inrun_megatron.data.readers import Piece, ReadOptions, read_piece
from inrun_megatron.data.tokenizers import Tokenizer, build_tokenizer
from inrun_megatron.errors import UserError


@dataclass
class TokenizedPiece:
    """The result of one piece: tokens of its documents one after the other."""

    path: str
    weight: int
    tokens: np.ndarray
    lengths: list[int] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    kept: list[Any] = field(default_factory=list)
    empty: int = 0


@dataclass(frozen=True)
class TokenizeJob:
    """What a worker process needs to know."""

    tokenizer: str | Path
    eod_token: str | None
    dtype: str
    """NumPy type of the tokens."""
    append_eod: bool
    options: ReadOptions


def tokenized(
    tasks: Iterable[Piece], job: TokenizeJob, tokenizer: Tokenizer, workers: int
) -> Generator[TokenizedPiece, None, None]:
    """The tokenized pieces, in order. `tokenizer` is the job's, for the case of one process."""
    if workers <= 1:
        for piece in tasks:
            yield _tokenize(piece, tokenizer, job)
        return
    # fork starts in milliseconds where spawn would import the package (and torch) in each worker; it is not safe on macOS
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(job,))
    try:
        yield from _in_order(pool, tasks, window=4 * workers)
    except BrokenProcessPool:
        raise UserError(
            f"a worker process was killed (often: out of memory) with --workers {workers}: use fewer workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, tasks: Iterable[Piece], window: int) -> Iterator[TokenizedPiece]:
    """Results in the order of `tasks`, with at most `window` pieces in memory (Executor.map takes all at once)."""
    waiting: deque[Future[TokenizedPiece]] = deque()
    for piece in tasks:
        waiting.append(pool.submit(_tokenize_in_worker, piece))
        if len(waiting) == window:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


_worker: tuple[Tokenizer, TokenizeJob]  # of a worker process, set once when it starts


def _start_worker(job: TokenizeJob) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per worker: the workers are the parallelism
    _worker = (build_tokenizer(job.tokenizer, job.eod_token), job)


def _tokenize_in_worker(piece: Piece) -> TokenizedPiece:
    return _tokenize(piece, *_worker)


def _tokenize(piece: Piece, tokenizer: Tokenizer, job: TokenizeJob) -> TokenizedPiece:
    documents = read_piece(piece, job.options)
    encoded = tokenizer.encode_batch([document.text for document in documents])
    result = TokenizedPiece(piece.path, piece.weight, np.empty(0, job.dtype))
    end = np.array([tokenizer.eod] if job.append_eod else [], job.dtype)
    parts: list[np.ndarray] = []
    for document, ids in zip(documents, encoded, strict=True):
        if len(ids) == 0:
            result.empty += 1
            continue
        parts += [ids.astype(job.dtype), end]
        result.lengths.append(len(ids) + len(end))
        result.lines.append(document.line)
        result.kept.append(document.kept)
    if parts:
        result.tokens = np.concatenate(parts)
    return result
