"""From a command line to a finished run."""

from __future__ import annotations

import os
import sys
import time
import traceback
import warnings
from collections.abc import Sequence

from inrun_megatron.errors import UserError
from inrun_megatron.training.exit_codes import FAILED
from inrun_megatron.training.signals import StopSignals

REPORT_SECONDS = 60.0
"""How long a rank that found bad input leaves its machine's first rank to say so; that one's exit ends the wait."""


def main(argv: Sequence[str]) -> int:
    """Run `launch/pretrain.py`'s command line on this rank; returns its exit code.

    Codes: training/exit_codes.py. A UserError is one line on stderr; what every rank finds wrong alike is reported by
    one of them.
    """
    signals = StopSignals()
    signals.note_early()
    # Optional packages that megatron-core does without, and torch's renamings that upstream has yet to follow: on every
    # rank, they would bury the run's own messages.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    from inrun_megatron.keeping.agreement import AgreedError
    from inrun_megatron.training.arguments import parse
    from inrun_megatron.training.distributed import launched, shut_down
    from inrun_megatron.training.run import prepare, run

    rank, world_size = launched()
    # Before ranks can talk, one per machine reports: files may be missing on one machine only.
    local = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")
    reports = next((os.environ[name] for name in local if name in os.environ), str(rank)) == "0"
    try:
        resolved = prepare(parse(argv), world_size)
    except UserError as error:
        if not reports:
            # A launcher ends every rank at the first exit: the one that reports must have done so by then.
            time.sleep(REPORT_SECONDS)
        return _fail(error, reports)
    try:
        code = run(resolved, signals)
    except AgreedError as error:
        code = _fail(error, rank == 0)
    except UserError as error:
        return _fail(error, True)
    except Exception:
        # Not left to the interpreter, whose shut-down may wait for groups in which the others no longer are.
        traceback.print_exc()
        return FAILED
    shut_down()
    return code


def _fail(error: UserError, report: bool) -> int:
    if report:
        print(f"error: {error}", file=sys.stderr, flush=True)
    return FAILED
