"""Small pieces of what people read: messages, flags, counts."""

from __future__ import annotations


def one_line(error: BaseException | str) -> str:
    """Its text on one line, as a UserError's has to be."""
    return " ".join(str(error).split())


def flag_of(name: str) -> str:
    """The flag of a field: `--micro-batch-size` of micro_batch_size."""
    return f"--{name.replace('_', '-')}"


def counted(number: int, noun: str) -> str:
    """`1 file`, `2,000 files`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
