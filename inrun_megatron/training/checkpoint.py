"""Checkpoints: DeepSpeed's, with what a resumed run needs to go on exactly.

RUN/checkpoints/latest                      tag of the newest complete checkpoint (written by DeepSpeed, last)
RUN/checkpoints/iter_0000100/               DeepSpeed's files
RUN/checkpoints/iter_0000100/run_state.json iteration, samples, layout: read before anything is loaded
RUN/checkpoints/iter_0000100/rng_00000.pt   RNG streams of each rank
RUN/checkpoints/iter_0000100/shards_*.json  what lies where in DeepSpeed's files: for a resume in another layout
"""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import asdict, dataclass
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
from inrun_megatron.ledger.files import refused, write_atomically
from inrun_megatron.models import cpu
from inrun_megatron.models.pipeline import GPTPipeline
from inrun_megatron.parallel import Layout
from inrun_megatron.training.distributed import all_ranks, rank0_then_all
from inrun_megatron.training.engine import Trainer, seed_streams

DIRECTORY = "checkpoints"


@dataclass
class Progress:
    """How far a run is: optimizer steps done, training samples consumed, last step that the ledger has committed."""

    iteration: int = 0
    consumed_samples: int = 0
    ledger_step: int = 0


@dataclass(frozen=True)
class Resume:
    """A checkpoint to go on from; `same_layout`: DeepSpeed can load it as it is."""

    path: Path
    same_layout: bool


def _layout(config: Config) -> dict[str, int | str]:
    training = config.training
    return {
        "world_size": dist.get_world_size(),
        "tensor_model_parallel_size": config.parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": config.parallel.pipeline_model_parallel_size,
        "zero_stage": int(config.parallel.zero_stage or 0),
        "precision": "bf16" if training.bf16 else "fp16" if training.fp16 else "fp32",
    }


def tag_of(iteration: int) -> str:
    """Megatron-LM's name of a checkpoint's directory."""
    return f"iter_{iteration:07d}"


def find(directory: str) -> Path | None:
    """The newest complete checkpoint of a run directory (or of its checkpoints directory), None without one."""
    for root in (Path(directory) / DIRECTORY, Path(directory)):
        latest = root / "latest"
        if latest.is_file():
            return root / latest.read_text(encoding="utf-8").strip()
    return None


def to_resume(config: Config) -> Resume | None:
    """The checkpoint that `--load` means; None to start from the beginning. Collective over the world.

    UserError: no checkpoint (unless --load is the run's own --save directory), or an incomplete one.
    """
    load = config.checkpoint.load
    if load is None:
        return None

    def check() -> Resume | None:
        path = find(load)
        if path is None:
            if (
                config.checkpoint.save is not None
                and Path(config.checkpoint.save).resolve() == Path(load).resolve()
            ):
                return None
            raise UserError(f"--load {load} holds no checkpoint (no {DIRECTORY}/latest): check the path")
        try:
            state = json.loads((path / "run_state.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(
                f"{path} is no complete checkpoint of this program: run_state.json: {error}"
            ) from None
        return Resume(path, state["layout"] == _layout(config))

    return rank0_then_all(check)


def _plain_rng_state() -> dict[str, Any]:
    """`cpu.rng_state` as tensors and plain values, so that it can be loaded without unpickling code."""
    state = cpu.rng_state()
    name, key, position, has_gauss, cached = state["numpy"]
    state["numpy"] = [name, torch.from_numpy(key.astype(np.int64)), position, has_gauss, cached]
    return state


def save(config: Config, trainer: Trainer, progress: Progress) -> Path:
    """Write the checkpoint of `progress`. Collective over the world.

    `latest` names the new checkpoint only after all of it is written, in one rename: DeepSpeed empties the file before
    it writes it anew. UserError on a rank whose file system refuses; the launcher then ends the others.
    """
    assert config.checkpoint.save is not None
    root = Path(config.checkpoint.save) / DIRECTORY
    path = root / tag_of(progress.iteration)
    try:
        if dist.get_rank() == 0:
            _clear(root, path, _layout(config))
        dist.barrier()
        path.mkdir(parents=True, exist_ok=True)
        torch.save(_plain_rng_state(), path / f"rng_{dist.get_rank():05d}.pt")
        note = describe(OptimizerState(trainer.engine, Layout.from_megatron()), *_names(trainer), path.name)
        if note is not None:
            (path / f"shards_{dist.get_rank():05d}.json").write_text(note, encoding="utf-8")
        if dist.get_rank() == 0:
            state = {**asdict(progress), "layout": _layout(config)}
            (path / "run_state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        dist.barrier()
        client_state = {"progress": asdict(progress), "schedule": trainer.schedule.state_dict()}
        trainer.engine.save_checkpoint(str(root), tag=path.name, client_state=client_state, save_latest=False)
    except OSError as error:
        raise refused(path, error) from error
    except RuntimeError as error:
        if "PytorchStreamWriter" not in str(error):  # torch.save's answer to a write that failed
            raise
        raise UserError(
            f"cannot write {path}: {str(error).splitlines()[0]}; free or repair the file system, then resume from the "
            "last checkpoint with --load"
        ) from error
    dist.barrier()
    if dist.get_rank() == 0:
        write_atomically(root / "latest", path.name.encode())
    return path


def _clear(root: Path, path: Path, layout: dict[str, int | str]) -> None:
    """Remove what a run in another layout left where this checkpoint goes: its shards and notes would mix with ours."""
    with contextlib.suppress(OSError, ValueError, KeyError):  # none, or one that a crash cut off
        if json.loads((path / "run_state.json").read_text(encoding="utf-8"))["layout"] == layout:
            return
    latest = root / "latest"
    if latest.is_file() and latest.read_text(encoding="utf-8").strip() == path.name:
        latest.unlink()
    if path.exists():
        shutil.rmtree(path)


def _names(trainer: Trainer) -> tuple[dict[int, str], dict[int, str]]:
    """id(parameter) -> its name in GPTModel, and in this rank's module."""
    model = trainer.model
    own = {id(parameter): name for name, parameter in model.named_parameters()}
    if not isinstance(model, GPTPipeline):
        return own, own
    return {key: model.gpt_name(name) for key, name in own.items()}, own


def load(config: Config, trainer: Trainer, resume: Resume) -> Progress:
    """Put a checkpoint back into the engine, the schedule and the RNG streams. Collective over the world.

    From another layout the RNG streams are new ones, seeded with the run's seed and the iteration: dropout draws differ.
    UserError on all ranks where the checkpoint is damaged or of another model.
    """
    if resume.same_layout:
        return _load(trainer, resume.path)
    return _load_reshaped(config, trainer, resume.path)


def _load(trainer: Trainer, path: Path) -> Progress:
    with torch.no_grad():  # a pipeline broadcasts tied weights in place
        loaded, client_state = trainer.engine.load_checkpoint(str(path.parent), tag=path.name)
    if loaded is None:
        raise UserError(f"DeepSpeed found no checkpoint in {path}")
    progress = _follow(trainer, client_state)
    state = torch.load(path / f"rng_{dist.get_rank():05d}.pt", weights_only=True)
    name, key, *rest = state["numpy"]
    state["numpy"] = (name, key.numpy().astype(np.uint32), *rest)
    cpu.set_rng_state(state)
    return progress


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
    Lookahead(state).settle()
    zero_files.restore_counters(trainer.engine, saved)
    progress = _follow(trainer, saved)
    seed_streams(config.training.seed + progress.iteration)
    return progress


def _follow(trainer: Trainer, client_state: dict[str, Any]) -> Progress:
    """Bring the schedule to the checkpoint's position; its own settings come from the flags."""
    trainer.schedule.num_steps = client_state["schedule"]["num_steps"]
    trainer.schedule.step(0)
    return Progress(**client_state["progress"])
