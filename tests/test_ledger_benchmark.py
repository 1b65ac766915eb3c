"""The generated ledger of benchmarks/ledger.py is a sound one, so that its timings are of what users have."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.ledger import BATCH, COMMANDS, TARGETS, timed, write_ledger
from inrun_megatron.ledger import Ledger


@pytest.mark.parametrize("granularity", ["sample", "document"])
def test_the_generated_ledger_is_whole(granularity: str, tmp_path: Path) -> None:
    written = write_ledger(tmp_path, 50_000, granularity)
    ledger = Ledger(tmp_path)
    assert ledger.granularity == granularity and ledger.last_step == written["steps"]
    assert written["rows"] == pytest.approx(50_000, rel=0.1) == sum(p.rows for p in ledger.parts("values"))
    assert all(check.ok for check in ledger.verify())
    if granularity == "document":
        assert written["rows"] > 1.3 * written["steps"] * BATCH * len(TARGETS)
    else:
        page = tmp_path / "page.html"
        assert timed(tmp_path, COMMANDS["report"], page)["peak_gib"] > 0 and page.stat().st_size > 500_000
