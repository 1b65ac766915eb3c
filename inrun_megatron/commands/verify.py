"""`inrun verify`: is the ledger whole, and do its audits hold?"""

from __future__ import annotations

import typer

from inrun_megatron.commands.options import JsonOption, RunArgument
from inrun_megatron.ledger.read import Ledger
from inrun_megatron.report.tables import checks_table, console, print_json


def verify(run: RunArgument, json: JsonOption = False) -> None:
    """Check files, rows and audits of a ledger. Exit code 1 when a check fails; a note fails nothing.

    Example: inrun verify runs/demo

    Files: every committed part is there with the bytes that were committed. Rows: finite, known, none twice, in agreement
    with the step records. Audits: coverage (every trainable parameter has a tap), additivity (the values add up to the
    gradient that the optimizer received), efficiency (predicted against realised loss change: a note beyond a factor of 2).
    """
    ledger = Ledger(run)
    checks = ledger.verify()
    ok = all(check.ok for check in checks)
    if json:
        print_json({"run": ledger.run_id, "ok": ok, "checks": [check.to_dict() for check in checks]})
    else:
        out = console()
        out.print(checks_table(checks))
        failed = [check.name for check in checks if not check.ok]
        verdict = f"failed: {', '.join(failed)}" if failed else f"all {len(checks)} checks passed"
        notes = [check.name for check in checks if check.ok and check.note]
        if notes:
            verdict += f"; with a note: {', '.join(notes)}"
        out.print(f"\nRun {ledger.run_id}: {verdict}")
    if not ok:
        raise typer.Exit(1)
