"""From a command line to a finished run."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence

from inrun_megatron.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Run `launch/pretrain.py`'s command line on this rank; returns its exit code.

    A UserError is one line on stderr and exit code 1. What every rank finds wrong alike is reported by one of them.
    """
    # Optional packages that megatron-core does without, and torch's renamings that upstream has yet to follow: on every
    # rank, they would bury the run's own messages.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    from inrun_megatron.training.arguments import parse
    from inrun_megatron.training.distributed import AgreedError, launched, shut_down
    from inrun_megatron.training.run import prepare, run

    rank, world_size = launched()
    # Before ranks can talk, one per machine reports: files may be missing on one machine only.
    reports = os.environ.get("LOCAL_RANK", os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK", str(rank))) == "0"
    try:
        settled = prepare(parse(argv), world_size)
    except UserError as error:
        return _fail(error, reports)
    try:
        run(settled)
    except AgreedError as error:
        code = _fail(error, rank == 0)
        shut_down()
        return code
    except UserError as error:
        return _fail(error, True)
    shut_down()
    return 0


def _fail(error: UserError, report: bool) -> int:
    if report:
        print(f"error: {error}", file=sys.stderr, flush=True)
    return 1
