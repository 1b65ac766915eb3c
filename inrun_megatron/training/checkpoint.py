"""Checkpoints: DeepSpeed's, with what a resumed run needs to go on exactly.

RUN/checkpoints/latest                      tag of the newest complete checkpoint (written by DeepSpeed, last)
RUN/checkpoints/iter_0000100/               DeepSpeed's files
RUN/checkpoints/iter_0000100/run_state.json iteration, samples, layout: read before anything is loaded
RUN/checkpoints/iter_0000100/rng_00000.pt   RNG streams of each rank
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from inrun_megatron.config import Config
from inrun_megatron.errors import UserError
from inrun_megatron.ledger.files import refused, write_atomically
from inrun_megatron.models import cpu
from inrun_megatron.training.distributed import rank0_then_all
from inrun_megatron.training.engine import Trainer

DIRECTORY = "checkpoints"


@dataclass
class Progress:
    """How far a run is: optimizer steps done, training samples consumed, last step that the ledger has committed."""

    iteration: int = 0
    consumed_samples: int = 0
    ledger_step: int = 0


def _layout(config: Config) -> dict[str, int]:
    return {
        "world_size": dist.get_world_size(),
        "tensor_model_parallel_size": config.parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": config.parallel.pipeline_model_parallel_size,
        "zero_stage": int(config.parallel.zero_stage or 0),
    }


def _whole_on_every_replica(config: Config) -> bool:
    """Does each data-parallel rank hold all of the optimizer's state? Then another number of them can load it."""
    training = config.training
    return int(config.parallel.zero_stage or 0) == 0 and not (training.bf16 or training.fp16)


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


def to_resume(config: Config) -> Path | None:
    """The checkpoint that `--load` means; None to start from the beginning. Collective over the world.

    UserError: no checkpoint (unless --load is the run's own --save directory), an incomplete one, or one that was
    written by a different number of ranks, tensor-parallel size or ZeRO stage. Where each data-parallel rank holds all of the
    optimizer's state their number may differ.
    """
    load = config.checkpoint.load
    if load is None:
        return None

    def check() -> Path | None:
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
        differing = [
            (name, state["layout"][name], now)
            for name, now in _layout(config).items()
            if state["layout"][name] != now
        ]
        if [name for name, *_ in differing] == ["world_size"] and _whole_on_every_replica(config):
            return path
        for name, then, now in differing:
            raise UserError(
                f"{path} was written with {name.replace('_', ' ')} {then}, this run has {now}: "
                "resume with the same layout (only fp32 with --zero-stage 0 resumes on another number of data-parallel "
                "ranks: DeepSpeed cannot cut ZeRO's partitions anew)"
            )
        return path

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
        path.mkdir(parents=True, exist_ok=True)
        torch.save(_plain_rng_state(), path / f"rng_{dist.get_rank():05d}.pt")
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


def load(trainer: Trainer, path: Path) -> Progress:
    """Put a checkpoint back into the engine, the schedule and the RNG streams. Collective over the world."""
    with torch.no_grad():  # a pipeline broadcasts tied weights in place
        loaded, client_state = trainer.engine.load_checkpoint(str(path.parent), tag=path.name)
    if loaded is None:
        raise UserError(f"DeepSpeed found no checkpoint in {path}")
    progress = Progress(**client_state["progress"])
    # The schedule's own settings come from the flags; its position from the checkpoint.
    trainer.schedule.num_steps = client_state["schedule"]["num_steps"]
    trainer.schedule.step(0)
    streams = path / f"rng_{dist.get_rank():05d}.pt"
    if not streams.exists():  # a rank that the run did not have: it keeps the streams it was seeded with
        return progress
    state = torch.load(streams, weights_only=True)
    name, key, *rest = state["numpy"]
    state["numpy"] = (name, key.numpy().astype(np.uint32), *rest)
    cpu.set_rng_state(state)
    return progress
