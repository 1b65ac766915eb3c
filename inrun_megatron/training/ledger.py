"""The ledger of a start: a new one, or the loaded run's own, taken back to its checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from inrun_megatron.config import Config
from inrun_megatron.keeping.description import sizes, versions
from inrun_megatron.ledger.belongs import ResumePoint, require_none_lost, require_own
from inrun_megatron.ledger.description import Starts
from inrun_megatron.ledger.run import step_of
from inrun_megatron.ledger.schema import COMMITS, DEFAULT_SUBDIRECTORY, RUN_FILE, RunDescription
from inrun_megatron.ledger.write import OpenLedger, create_ledger, open_ledger, rollback
from inrun_megatron.parallel import Layout
from inrun_megatron.training import run_state
from inrun_megatron.training.arguments import to_mapping


def ledger_directory(config: Config) -> Path:
    """`--shapley-dir`, else shapley/ in the run directory."""
    if config.shapley.dir is not None:
        return Path(config.shapley.dir)
    assert config.checkpoint.save is not None
    return Path(config.checkpoint.save) / DEFAULT_SUBDIRECTORY


def describe(
    config: Config,
    layout: Layout,
    *,
    targets: Sequence[Any],
    datasets: Sequence[Mapping[str, Any]],
    coverage: dict[str, Any],
) -> RunDescription:
    """What the ledger says of this start.

    targets: `inrun_megatron.data.targets.Target`s. datasets: the training data's table. coverage: of the whole model.
    """
    return RunDescription(
        targets=[{"name": target.name, **target.description} for target in targets],
        datasets=[dict(dataset) for dataset in datasets],
        configuration=to_mapping(config),
        versions=versions(),
        layout=sizes(layout),
        coverage=coverage,
    )


def open_run_ledger(config: Config, description: RunDescription, point: ResumePoint) -> OpenLedger:
    """A new ledger, or the one that `point` left, taken back to it. One process of the run calls it.

    UserError where the ledger that lies there is not this run's, or its own is missing.
    """
    directory = ledger_directory(config)
    found = (directory / RUN_FILE).exists()
    if not found and run_state.in_place(config) and config.shapley.dir is None:
        require_none_lost(directory, point)
    if config.checkpoint.load is None or not found:
        return create_ledger(directory, description)
    ledger = open_ledger(directory, description)
    try:
        starts = Starts(directory, ledger.run)
        require_own(
            ledger,
            starts,
            point,
            save=None if config.shapley.dir is None else config.checkpoint.save,
            train_iters=config.training.train_iters,
        )
        kept = point.rows_up_to(ledger.run_id)
        _say_what_is_repeated(rollback(directory, kept), kept, point.step)
        starts.append(point.step, description, point.ledger_step)
    except BaseException:
        ledger.close()
        raise
    return ledger


def _say_what_is_repeated(removed: Sequence[str], step: int, iteration: int) -> None:
    """removed: by `rollback` to `step`. iteration: of the checkpoint."""
    last = max((step_of(Path(name)) for name in removed if name.startswith(f"{COMMITS}/")), default=0)
    if last > step:
        why = "are repeated" if step == iteration else "were trained again without scoring"
        print(
            f"the ledger's values of steps {step + 1} to {last} are taken back: these steps {why}",
            file=sys.stderr,
            flush=True,
        )
