"""Which targets a command is about."""

from __future__ import annotations

from inrun_megatron.errors import UserError
from inrun_megatron.ledger.read import Ledger


def chosen_targets(ledger: Ledger, target: str | None) -> list[str]:
    """The named target, or all. Raises UserError on an unknown one."""
    if target is None:
        return ledger.target_names
    if target not in ledger.target_names:
        raise UserError(f"the run has no target {target!r}; it has {', '.join(ledger.target_names)}")
    return [target]
