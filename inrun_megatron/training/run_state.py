"""What a checkpoint says of the run that wrote it (run_state.json): read before anything is loaded."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from inrun_megatron.config import Config
from inrun_megatron.errors import UserError
from inrun_megatron.ledger.files import read_json

RUN_STATE_FILE = "run_state.json"

# Fields of the model's configuration that another start of the same run may change: they only draw dropout and first
# weights; the padding of the vocabulary holds no weights.
_NOT_THE_MODEL = (
    "attention_dropout",
    "hidden_dropout",
    "init_method_std",
    "make_vocab_size_divisible_by",
    "max_position_embeddings",  # rows of a weight, whose shape is compared
)


def layout_of(config: Config) -> dict[str, int | str]:
    """Sizes, ZeRO stage and precision, by which DeepSpeed's files are cut."""
    training = config.training
    return {
        "world_size": dist.get_world_size(),
        "tensor_model_parallel_size": config.parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": config.parallel.pipeline_model_parallel_size,
        "zero_stage": int(config.parallel.zero_stage or 0),
        "precision": "bf16" if training.bf16 else "fp16" if training.fp16 else "fp32",
    }


def model_of(config: Config) -> dict[str, Any]:
    """What the weights are of, with defaults settled: weights of equal shapes may belong to different models."""
    model = config.model
    settled = asdict(model) | {
        "ffn_hidden_size": model.resolved_ffn_hidden_size,
        "kv_channels": model.resolved_kv_channels,
        "num_query_groups": model.query_groups,
    }
    return {name: value for name, value in settled.items() if name not in _NOT_THE_MODEL}


def description(config: Config, ledger: str | None) -> dict[str, Any]:
    """Layout, model and optimizer, and the run_id of the ledger that holds the values up to here, as they are saved."""
    return {
        "ledger": ledger,
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
    if not isinstance(state.get("layout"), dict):
        raise UserError(f"{path} is no complete checkpoint of this program: {RUN_STATE_FILE} has no layout")
    return state


def check_same_run(path: Path, state: dict[str, Any], config: Config) -> None:
    """UserError unless the run that wrote the checkpoint trained this model with this optimizer. Older checkpoints say less."""
    saved, now = state.get("model") or {}, model_of(config)
    for name, value in now.items():
        if saved.get(name, value) != value:
            raise UserError(
                f"{path} was written with {_flag(name)} {saved[name]}, this run has {value}: give the flags of the model "
                "that was saved"
            )
    optimizer = config.training.optimizer
    before = state.get("optimizer", optimizer)
    if before != optimizer:
        raise UserError(
            f"{path} holds the state of --optimizer {before}, this run has {optimizer}: resume with --optimizer {before}"
        )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
