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
    written by a different number of ranks, tensor-parallel size or ZeRO stage.
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
        for name, now in _layout(config).items():
            then = state["layout"][name]
            if then != now:
                raise UserError(
                    f"{path} was written with {name.replace('_', ' ')} {then}, this run has {now}: "
                    f"resume with the same layout"
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

    `latest` names the new checkpoint only after all of it is written.
    """
    assert config.checkpoint.save is not None
    root = Path(config.checkpoint.save) / DIRECTORY
    path = root / tag_of(progress.iteration)
    path.mkdir(parents=True, exist_ok=True)
    torch.save(_plain_rng_state(), path / f"rng_{dist.get_rank():05d}.pt")
    if dist.get_rank() == 0:
        state = {**asdict(progress), "layout": _layout(config)}
        (path / "run_state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    dist.barrier()
    client_state = {"progress": asdict(progress), "schedule": trainer.schedule.state_dict()}
    trainer.engine.save_checkpoint(str(root), tag=path.name, client_state=client_state)
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
    state = torch.load(path / f"rng_{dist.get_rank():05d}.pt", weights_only=True)
    name, key, *rest = state["numpy"]
    state["numpy"] = (name, key.numpy().astype(np.uint32), *rest)
    cpu.set_rng_state(state)
    return progress
