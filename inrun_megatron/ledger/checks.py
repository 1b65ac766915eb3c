"""What a check is, and small helpers of all checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

NAMED = 5
"""How many offenders a detail names; the figures have all."""


@dataclass(frozen=True)
class Check:
    """One judged property. `figures` is JSON-serialisable; `note`: it holds, and its detail asks to be read."""

    name: str
    ok: bool
    detail: str
    figures: dict[str, Any] = field(default_factory=dict)
    note: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As `inrun verify --json` prints it."""
        return asdict(self)


def setting(run: Mapping[str, Any], name: str, default: Any = None, group: str | None = None) -> Any:
    """A configuration value by name: in `group` if given, else at the top level or in any group."""
    configuration = run.get("configuration") or {}
    if group is not None:
        values = configuration.get(group)
        return values.get(name, default) if isinstance(values, dict) else default
    if name in configuration:
        return configuration[name]
    for values in configuration.values():
        if isinstance(values, dict) and name in values:
            return values[name]
    return default


def name_some(what: str, offenders: Sequence[str]) -> str:
    """How many offenders there are, and the first NAMED of them."""
    shown = "; ".join(offenders[:NAMED])
    more = f"; and {len(offenders) - NAMED:,} more" if len(offenders) > NAMED else ""
    return f"{len(offenders):,} {what} {shown}{more}"
