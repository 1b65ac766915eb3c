"""Checkpoints: DeepSpeed's, with what a resumed run needs to go on exactly.

RUN/checkpoints/latest                      tag of the newest complete checkpoint (written by DeepSpeed, last)
RUN/checkpoints/iter_0000100/               DeepSpeed's files
RUN/checkpoints/iter_0000100/run_state.json iteration, samples, layout, model (run_state.py): read before anything is loaded
RUN/checkpoints/iter_0000100/rng_00000.pt   RNG streams of each rank
RUN/checkpoints/iter_0000100/shards_*.json  what lies where in DeepSpeed's files: for a resume in another layout
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from inrun_megatron.config import Config
from inrun_megatron.engines import zero_files
from inrun_megatron.engines.lookahead import Lookahead
from inrun_megatron.engines.reshape import Saved, describe, restore
from inrun_megatron.engines.zero_groups import OptimizerState
from inrun_megatron.errors import UserError
from inrun_megatron.keeping.agreement import all_ranks, rank0_then_all
from inrun_megatron.ledger.files import (
    fsync_directory,
    fsync_file,
    make_directory,
    read_json,
    refused,
    write_atomically,
)
from inrun_megatron.models import cpu
from inrun_megatron.models.pipeline import GPTPipeline
from inrun_megatron.parallel import Layout
from inrun_megatron.training import run_state
from inrun_megatron.training.engine import Trainer, seed_streams
from inrun_megatron.training.run_state import DIRECTORY, RUN_STATE_FILE, Resume

_FAILED_WRITES = ("PytorchStreamWriter", "inline_container", "iostream error")
"""In torch.save's answers to a write that failed. The last one it raises is about the archive that it then closes."""


@dataclass
class Progress:
    """How far a run is: optimizer steps done, training samples consumed, last step that the ledger has committed; that
    ledger's run_id (None where no step was scored); the order of its data (datasets.py)."""

    iteration: int = 0
    consumed_samples: int = 0
    ledger_step: int = 0
    ledger: str | None = None
    data: str | None = None

    @property
    def counters(self) -> dict[str, int]:
        """What DeepSpeed's files hold of it: the same with and without scoring, but for ledger_step."""
        return {
            "iteration": self.iteration,
            "consumed_samples": self.consumed_samples,
            "ledger_step": self.ledger_step,
        }


def tag_of(iteration: int) -> str:
    """Megatron-LM's name of a checkpoint's directory."""
    return f"iter_{iteration:07d}"


def _plain_rng_state() -> dict[str, Any]:
    """`cpu.rng_state` as tensors and plain values, so that it can be loaded without unpickling code."""
    state = cpu.rng_state()
    name, key, position, has_gauss, cached = state["numpy"]
    state["numpy"] = [name, torch.from_numpy(key.astype(np.int64)), position, has_gauss, cached]
    return state


def save(config: Config, trainer: Trainer, progress: Progress) -> Path:
    """Write the checkpoint of `progress`. Collective over the world.

    `latest` names the new checkpoint only after all of it is written and synced, in one rename: DeepSpeed empties the
    file before it writes it anew. UserError on a rank whose file system refuses; the launcher then ends the others.
    """
    assert config.checkpoint.save is not None
    root = Path(config.checkpoint.save) / DIRECTORY
    path = root / tag_of(progress.iteration)
    retain = config.checkpoint.save_retain_interval
    before = None if retain is None else rank0_then_all(lambda: run_state.find(str(root.parent)))
    with _refusals_in_one_line(path):
        if dist.get_rank() == 0:
            _clear(root, path, run_state.layout_of(config))
            make_directory(path)
        dist.barrier()
        # there already, but on file systems that the hosts do not share
        path.mkdir(parents=True, exist_ok=True)
        files = _write_own(config, trainer, progress, path)
        dist.barrier()
        files += _write_deepspeed(trainer, progress, path)
        # `latest` must not reach the disk before what it names.
        for file in files:
            fsync_file(file)
        dist.barrier()
        if dist.get_rank() == 0:
            fsync_directory(path)
            fsync_directory(root)
            write_atomically(root / "latest", path.name.encode())
    if retain is not None and before not in (None, path):
        _forget(before, retain)
    return path


def _write_own(config: Config, trainer: Trainer, progress: Progress, path: Path) -> list[Path]:
    """This rank's files beside DeepSpeed's."""
    written = [path / f"rng_{dist.get_rank():05d}.pt"]
    torch.save(_plain_rng_state(), written[0])
    note = _note(trainer, path)
    if note is not None:
        written.append(_note_file(path))
        written[-1].write_text(note, encoding="utf-8")
    if dist.get_rank() == 0:
        state = {**progress.counters, **run_state.description(config, progress.ledger, progress.data)}
        written.append(path / RUN_STATE_FILE)
        written[-1].write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    return written


def _write_deepspeed(trainer: Trainer, progress: Progress, path: Path) -> list[Path]:
    """DeepSpeed's files; returns this rank's. Collective over the world."""
    client_state = {
        "progress": progress.counters,
        "schedule": trainer.schedule.state_dict(),
        "expert_biases": trainer.biases.state(),
    }
    with _noting_files(trainer.engine) as written:
        trainer.engine.save_checkpoint(
            str(path.parent), tag=path.name, client_state=client_state, save_latest=False
        )
    return written


@contextlib.contextmanager
def _refusals_in_one_line(path: Path) -> Iterator[None]:
    """A file system that refuses to write the checkpoint `path`, as a UserError."""
    try:
        yield
    except OSError as error:
        raise refused(path, error) from error
    except RuntimeError as error:
        if not any(name in str(error) for name in _FAILED_WRITES):
            raise
        raise UserError(
            f"cannot write {path}: the file system is full or failing (torch.save: {str(error).splitlines()[0]}); free or "
            "repair it, then resume from the last checkpoint with --load"
        ) from error


def _forget(path: Path, retain: int) -> None:
    """Delete a checkpoint in whose place another is named, unless its step is a multiple of `retain`. On every host: they may
    not share a file system."""
    step = path.name.removeprefix("iter_")
    dist.barrier()
    if step.isdecimal() and int(step) % retain and os.environ["LOCAL_RANK"] == "0":
        shutil.rmtree(path, ignore_errors=True)  # another host may be at it


@contextlib.contextmanager
def _noting_files(engine: Any) -> Iterator[list[Path]]:
    """The files that DeepSpeed writes on this rank meanwhile: all go through its checkpoint engine (deepspeed 0.19)."""
    writer, written = engine.checkpoint_engine, []
    write = writer.save

    def noted(state_dict: Any, path: str, **options: Any) -> Any:
        written.append(Path(path))
        return write(state_dict, path, **options)

    writer.save = noted
    try:
        yield written
    finally:
        del writer.save


def _clear(root: Path, path: Path, layout: dict[str, int | str]) -> None:
    """Remove what a run in another layout left where this checkpoint goes: its shards and notes would mix with ours."""
    with contextlib.suppress(UserError):  # none, or one that a crash cut off
        if run_state.read(path)["layout"] == layout:
            return
    latest = root / "latest"
    # A run goes on from `latest`, or finds none (to_resume): it has nothing to write in its place.
    assert not latest.is_file() or latest.read_text(encoding="utf-8").strip() != path.name
    if path.exists():
        shutil.rmtree(path)


def _names(trainer: Trainer) -> tuple[dict[int, str], dict[int, str]]:
    """id(parameter) -> its name in GPTModel, and in this rank's module."""
    model = trainer.model
    own = {id(parameter): name for name, parameter in model.named_parameters()}
    if not isinstance(model, GPTPipeline):
        return own, own
    return {key: model.gpt_name(name) for key, name in own.items()}, own


def _note_file(path: Path) -> Path:
    return path / f"shards_{dist.get_rank():05d}.json"


def _note(trainer: Trainer, path: Path) -> str | None:
    """What lies where in this rank's files, None where another replica's note says it."""
    return describe(OptimizerState(trainer.engine, Layout.from_megatron()), *_names(trainer), path.name)


def load(config: Config, trainer: Trainer, resume: Resume) -> tuple[Progress, bool]:
    """Put a checkpoint back into the engine, the schedule and the RNG streams. Collective over the world.

    Also returns whether DeepSpeed could load it as it is. From another layout the RNG streams are new ones, seeded with
    the run's seed and the iteration: dropout draws differ. UserError on all ranks where the checkpoint is damaged or of
    another model.
    """
    all_ranks(lambda: run_state.check_whole(resume))
    as_it_is = resume.same_layout and _everywhere(all_ranks(lambda: _lies_the_same(trainer, resume.path)))
    progress = _load(trainer, resume.path) if as_it_is else _load_reshaped(config, trainer, resume.path)
    progress.ledger, progress.data = resume.ledger, resume.data
    _follow(config, trainer)
    return progress, as_it_is


def _everywhere(here: bool) -> bool:
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, here)
    return all(answers)


def _lies_the_same(trainer: Trainer, path: Path) -> bool:
    """Whether the engine lays this rank's shard out as the checkpoint does.

    DeepSpeed loads flat buffers by their size alone: a setting of its JSON that orders them in another way
    (round_robin_gradients, say) would put weights into each other's places.
    """
    note, file = _note(trainer, path), _note_file(path)
    if note is None or not file.is_file():
        return note is None and not file.is_file()
    return bool(read_json(file) == json.loads(note))


def _load(trainer: Trainer, path: Path) -> Progress:
    groups = trainer.optimizer.param_groups
    settings = [{key: group[key] for key in group.keys() - {"params", zero_files.STEP}} for group in groups]
    with torch.no_grad():  # a pipeline broadcasts tied weights in place
        loaded, client_state = trainer.engine.load_checkpoint(str(path.parent), tag=path.name)
    if loaded is None:
        raise UserError(f"DeepSpeed found no checkpoint in {path}")
    # The checkpoint brought its own hyperparameters; as in another layout, the flags decide.
    for group, own in zip(trainer.optimizer.param_groups, settings, strict=True):
        group.update(own)
    zero_files.clip_as_configured(trainer.engine)
    state = torch.load(path / f"rng_{dist.get_rank():05d}.pt", weights_only=True)
    name, key, *rest = state["numpy"]
    state["numpy"] = (name, key.numpy().astype(np.uint32), *rest)
    cpu.set_rng_state(state)
    trainer.biases.restore(client_state.get("expert_biases", {}))
    return Progress(**client_state["progress"])


def _load_reshaped(config: Config, trainer: Trainer, path: Path) -> Progress:
    layout = Layout.from_megatron()
    state = OptimizerState(trainer.engine, layout)
    names, _ = _names(trainer)
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, set(names.values()))

    def read() -> dict[str, Any]:
        saved = Saved(path)
        saved.check_names(set().union(*everywhere))
        restore(state, names, saved)
        counted = zero_files.counters(saved.model_file)
        zero_files.opened.cache_clear()  # the mapped files may be deleted while this run lives
        return counted

    # Gathering the weights afterwards is a collective: nobody may have failed before it.
    saved = all_ranks(read)
    Lookahead(state).copy_from_masters()
    zero_files.restore_counters(trainer.engine, saved)
    trainer.biases.restore(saved.get("expert_biases", {}))
    progress = Progress(**saved["progress"])
    seed_streams(config.training.seed + progress.iteration)
    return progress


def _follow(config: Config, trainer: Trainer) -> None:
    """Bring the schedule to the steps that were taken, skipped ones left out; its own settings come from the flags.

    It counts samples, but its flags are in steps: those that are done count as of the global batch of now.
    """
    assert config.training.global_batch_size is not None  # training/deepspeed_config.py
    taken = trainer.engine.global_steps - trainer.engine.skipped_steps
    trainer.schedule.num_steps = taken * config.training.global_batch_size
    trainer.schedule.step(0)
