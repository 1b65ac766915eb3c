"""Which checkpoint a start goes on from, and what it says of the run that wrote it: before anything is loaded."""

from __future__ import annotations

import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from inrun_megatron.config import Config
from inrun_megatron.errors import UserError
from inrun_megatron.keeping.agreement import rank0_then_all
from inrun_megatron.ledger.files import read_json
from inrun_megatron.wording import flag_of

DIRECTORY = "checkpoints"
RUN_STATE_FILE = "run_state.json"

# What is saved: Progress.counters and `description`.
_FIELDS = (
    "iteration",
    "consumed_samples",
    "ledger_step",
    "ledger",
    "data",
    "global_batch_size",
    "layout",
    "model",
    "optimizer",
)
# Fields of the model's configuration that another start of the same run may change: they only draw dropout and first
# weights; the padding of the vocabulary holds no weights.
_NOT_THE_MODEL = (
    "attention_dropout",
    "hidden_dropout",
    "init_method_std",
    "make_vocab_size_divisible_by",
)


@dataclass(frozen=True)
class Resume:
    """A checkpoint to go on from. `same_layout`: sizes, ZeRO stage, precision and kind of device are this run's; `ledger`, `iteration`,
    `consumed_samples` and `data`: as in Progress."""

    path: Path
    same_layout: bool
    ledger: str | None
    iteration: int
    consumed_samples: int
    global_batch_size: int
    data: str | None


def find(directory: str) -> Path | None:
    """The newest complete checkpoint of a run directory (or of its checkpoints directory), None without one."""
    for root in (Path(directory) / DIRECTORY, Path(directory)):
        latest = root / "latest"
        if latest.is_file():
            return root / latest.read_text(encoding="utf-8").strip()
    return None


def in_place(config: Config) -> bool:
    """Whether the run goes on in its own directory: --load is --save."""
    load, save = config.checkpoint.load, config.checkpoint.save
    return load is not None and save is not None and Path(save).resolve() == Path(load).resolve()


def to_resume(config: Config) -> Resume | None:
    """The checkpoint that `--load` means; None to start from the beginning. Collective over the world.

    UserError: no checkpoint (unless --load is the run's own --save directory), an incomplete one, or another model's; a
    --save directory that holds another run's checkpoints.
    """
    return rank0_then_all(lambda: _to_resume(config))


def _to_resume(config: Config) -> Resume | None:
    load, save = config.checkpoint.load, config.checkpoint.save
    path = None if load is None else find(load)
    if load is not None and path is None and not in_place(config):
        raise UserError(f"--load {load} holds no checkpoint (no {DIRECTORY}/latest): check the path")
    own = None if save is None else Path(save) / DIRECTORY
    goes_on = path is not None and own is not None and path.parent.resolve() == own.resolve()
    if own is not None and (own / "latest").is_file() and not goes_on:
        raise UserError(
            f"--save {save} holds the checkpoints of a run, which would be overwritten: go on with --load {save}, or "
            "choose another --save"
        )
    if path is None:
        return None
    state = read(path)
    check_same_run(path, state, config)
    return Resume(
        path,
        same_layout=state["layout"] == layout_of(config),
        ledger=state["ledger"],
        iteration=state["iteration"],
        consumed_samples=state["consumed_samples"],
        global_batch_size=state["global_batch_size"],
        data=state["data"],
    )


def check_whole(resume: Resume) -> None:
    """UserError naming a file that a crash of a host or a full disk cut off. Every rank looks at its share of the files."""
    path, rank, world = resume.path, dist.get_rank(), dist.get_world_size()
    own = [path / f"rng_{rank:05d}.pt"] if resume.same_layout else []
    for file in {*sorted(path.glob("*.pt"))[rank::world], *own}:
        if not _ends_as_written(file):
            raise UserError(
                f"{file} is {'damaged' if file.is_file() else 'missing'}: restore it from a copy, or write the name of an "
                f"earlier checkpoint into {path.parent / 'latest'}"
            )
    for file in sorted(path.glob("*.json"))[rank::world]:
        read_json(file)


def _ends_as_written(file: Path) -> bool:
    """A file of torch.save is a zip, whose directory lies at the end."""
    return zipfile.is_zipfile(file)


def layout_of(config: Config) -> dict[str, int | str]:
    """Sizes, ZeRO stage and precision, by which DeepSpeed's files are cut; and the device, whose random generators and fused
    optimizer another one could not go on with."""
    training = config.training
    return {
        "world_size": dist.get_world_size(),
        "tensor_model_parallel_size": config.parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": config.parallel.pipeline_model_parallel_size,
        "zero_stage": int(config.parallel.zero_stage or 0),
        "precision": "bf16" if training.bf16 else "fp16" if training.fp16 else "fp32",
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }


def model_of(config: Config) -> dict[str, Any]:
    """What the weights are of, with defaults resolved: weights of equal shapes may belong to different models."""
    model = config.model
    positions = None
    if model.position_embedding_type == "learned_absolute":
        positions = model.max_position_embeddings or config.data.seq_length
    resolved = asdict(model) | {
        "ffn_hidden_size": model.resolved_ffn_hidden_size,
        "kv_channels": model.resolved_kv_channels,
        "num_query_groups": model.query_groups,
        "max_position_embeddings": positions,
    }
    return {name: value for name, value in resolved.items() if name not in _NOT_THE_MODEL}


def description(config: Config, ledger: str | None, data: str | None) -> dict[str, Any]:
    """Layout, batch, model, optimizer, the order of the data, and the run_id of the ledger that holds the values up to here,
    as they are saved."""
    return {
        "ledger": ledger,
        "data": data,
        "global_batch_size": config.training.global_batch_size,
        "layout": layout_of(config),
        "model": model_of(config),
        "optimizer": config.training.optimizer,
    }


def read(path: Path) -> dict[str, Any]:
    """The state of the checkpoint in `path`. UserError when it is not complete."""
    try:
        state = read_json(path / RUN_STATE_FILE)
    except UserError as error:
        raise UserError(f"{path} is no complete checkpoint of this program: {error}") from None
    for field in _FIELDS:
        if field not in state:
            raise UserError(
                f"{path} is no complete checkpoint of this program: {RUN_STATE_FILE} has no {field}"
            )
    return state


def check_same_run(path: Path, state: dict[str, Any], config: Config) -> None:
    """UserError unless the run that wrote the checkpoint trained this model with this optimizer."""
    saved = state["model"]
    for name, value in model_of(config).items():
        # What an earlier version did not note shows in the weights' shapes.
        if name in saved and saved[name] != value:
            raise UserError(
                f"{path} was written with {flag_of(name)} {saved[name]}, this run has {value}: give the flags of the model "
                "that was saved"
            )
    before, optimizer = state["optimizer"], config.training.optimizer
    if before != optimizer:
        raise UserError(
            f"{path} holds the state of --optimizer {before}, this run has {optimizer}: resume with --optimizer {before}"
        )
