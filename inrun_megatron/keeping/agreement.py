"""Ranks that agree on errors, before one of them waits for another that has failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from ..errors import UserError

T = TypeVar("T")


class AgreedError(UserError):
    """A UserError that every rank raises at the same place; rank 0 reports it."""


def all_ranks(check: Callable[[], T]) -> T:
    """`check()` on every rank of the world; when it is a UserError on any, the same AgreedError on all. After any other
    error the rank raises its own, and the others an AgreedError.

    Collective over the world. `check` itself must not wait for other ranks after it may have failed.
    """
    outcome: T | None = None
    own: Exception | None = None
    message: str | None = None
    try:
        outcome = check()
    except UserError as error:
        message = str(error)
    except Exception as error:  # a bug, of which the others must know, too
        own, message = error, f"rank {dist.get_rank()}: {type(error).__name__}: {error}"
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    if own is not None:
        raise own
    failed = [text for text in messages if text is not None]
    if failed:
        raise AgreedError(failed[0])
    return outcome  # type: ignore[return-value]


def require_same(what: str, value: object, remedy: str) -> None:
    """AgreedError on every rank unless `value` is the same on all. Collective over the world."""
    values: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    for rank, other in enumerate(values):
        if other != values[0]:
            raise AgreedError(f"{what} {values[0]!r} on rank 0 and {other!r} on rank {rank}: {remedy}")


def rank0_then_all(check: Callable[[], T]) -> T:
    """`check()` on rank 0 only; its result, or its UserError as AgreedError, on every rank."""
    holder: list[T | None] = [all_ranks(lambda: check() if dist.get_rank() == 0 else None)]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]  # type: ignore[return-value]
