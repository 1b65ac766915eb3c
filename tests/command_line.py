"""The `inrun` command in this process: as its user sees it, exit code and all."""

from __future__ import annotations

import contextlib
import io
import json
from typing import Any, NamedTuple

import pytest

from inrun_megatron import cli
from inrun_megatron.errors import UserError


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def inrun(*arguments: object) -> Outcome:
    """Run the command; a failure has its exit code."""
    # Wrappers of bytes, as a process has: the command sets how they encode.
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="") for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with pytest.raises(SystemExit) as exit_:
            cli.main([str(argument) for argument in arguments])
    code = exit_.value.code
    assert isinstance(code, int)
    return Outcome(code, *(_text(stream) for stream in (out, err)))


def answer(*arguments: object) -> Any:
    """What the command prints, parsed with --json. A failure is a UserError with its one line."""
    outcome = inrun(*arguments)
    if outcome.code:
        assert outcome.out == "" and outcome.err.count("\n") == 1
        raise UserError(outcome.err)
    return outcome.json if "--json" in arguments else outcome.out


def _text(stream: io.TextIOWrapper) -> str:
    stream.flush()
    assert isinstance(stream.buffer, io.BytesIO)
    return stream.buffer.getvalue().decode()
