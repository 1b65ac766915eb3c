"""Exit codes of launch/pretrain.py, for scripts that start it (sysexits.h has the numbers)."""

FINISHED = 0
FAILED = 1
"""Bad input or an error; the same command fails again until something is changed."""
RANK_LOST = 69
"""Another rank died, hung or could not be reached: start the same command again on sound hosts."""
STOPPED = 75
"""SIGTERM or SIGUSR1: checkpoint and ledger are saved; the same command goes on from there."""
