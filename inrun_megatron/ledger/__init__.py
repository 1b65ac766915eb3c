"""The ledger: every value of a run in plain Parquet files. docs/ledger.md documents layout and protocol.

Knows nothing of torch or torch.distributed.
"""

from inrun_megatron.ledger.checks import Check
from inrun_megatron.ledger.read import Ledger, locate
from inrun_megatron.ledger.write import (
    LedgerWriter,
    OpenLedger,
    PartInfo,
    RunDescription,
    StepRecord,
    commit,
    create_ledger,
    open_ledger,
    rollback,
)

__all__ = [
    "Check",
    "Ledger",
    "LedgerWriter",
    "OpenLedger",
    "PartInfo",
    "RunDescription",
    "StepRecord",
    "commit",
    "create_ledger",
    "locate",
    "open_ledger",
    "rollback",
]
