"""Reading masters and moments out of DeepSpeed's checkpoint files, whatever optimizer wrote them.

Upstream (deepspeed 0.19): `state_dict` of the optimizers that zero_groups.py names, and `_save_checkpoint`,
`_save_zero_checkpoint` and `_get_zero_ckpt_name` of runtime/engine.py. Files are mapped, not read: only what is used of
them comes into memory.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.pipe.module import PipelineModule
from torch import Tensor

from ..errors import UserError

WEIGHT = "weight"
"""The field of a piece that holds its master weights; the others are the inner optimizer's names."""

STEP = "step"
"""Optimizer steps taken: kept per tensor or per group, by optimizer."""

# Under which name each wrapper saves its masters.
_MASTERS = ("single_partition_of_fp32_groups", "fp32_flat_groups", "fp32_groups_flat", "fp32_groups")
_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "last_hysteresis", "cur_hysteresis")


def model_file(engine: Any, tag: str) -> str:
    """Name of the file in a checkpoint's directory that holds this rank's counters (and weights, without stages)."""
    return Path(engine._get_ckpt_name("", tag)).name


def optimizer_file(engine: Any, tag: str) -> str:
    """Name of the file that holds this rank's part of the optimizer's state."""
    if not engine.save_zero_checkpoint:
        return model_file(engine, tag)
    return Path(engine._get_zero_ckpt_name("", tag)).name


def weight_places(engine: Any, tag: str) -> dict[str, tuple[str, list[str]]]:
    """Where the layers' own weights are saved: parameter's name -> (file, keys in it).

    A pipeline saves a file per layer; a tied weight is the first stage's.
    """
    module = engine.module
    if not isinstance(module, PipelineModule):
        return {name: (model_file(engine, tag), ["module", name]) for name, _ in module.named_parameters()}
    own = {id(parameter): name for name, parameter in module.named_parameters()}
    places: dict[str, tuple[str, list[str]]] = {}
    for index, layer in enumerate(module.forward_funcs):
        if isinstance(layer, torch.nn.Module):
            file = Path(module.ckpt_layer_path("", index)).name
            places |= {own[id(parameter)]: (file, [key]) for key, parameter in layer.named_parameters()}
    return places


@cache
def opened(path: Path) -> Any:
    """A file of a checkpoint, its tensors mapped. It may name classes (loss scalers), as DeepSpeed's own loader lets it."""
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)


def counters(path: Path) -> dict[str, Any]:
    """The engine's counters and the client's state, from a model file."""
    return {key: value for key, value in opened(path).items() if key not in ("module", "optimizer")}


def restore_counters(engine: Any, saved: dict[str, Any]) -> None:
    """What `load_checkpoint` restores beside weights and optimizer."""
    engine.global_steps = saved["global_steps"]
    engine.global_samples = saved["global_samples"]
    engine.skipped_steps = saved["skipped_steps"]


def clip_as_configured(engine: Any) -> None:
    """`load_checkpoint` also brings the threshold that the checkpoint's run clipped at (not at ZeRO stage 3)."""
    if hasattr(engine.optimizer, "clip_grad"):
        engine.optimizer.clip_grad = engine.gradient_clipping()


def _optimizer_state(path: Path) -> dict[str, Any]:
    file = opened(path)
    found: dict[str, Any] = file["optimizer"] if file.get("optimizer") else file["optimizer_state_dict"]
    return found


def masters(path: Path) -> list[Tensor] | None:
    """The master weights of every piece; None where the optimizer steps the layers' own weights."""
    state = _optimizer_state(path)
    for name in _MASTERS:
        if name in state:
            return [
                tensor
                for group in state[name]
                for tensor in (group if isinstance(group, (list, tuple)) else [group])
            ]
    return None


def moments(path: Path, number: int, param_group: int) -> dict[str, Any]:
    """The inner optimizer's state of its tensor `number`, flat; and its `step`, wherever it is counted."""
    state = _optimizer_state(path)
    inner = state.get("base_optimizer_state") or state.get("optimizer_state_dict") or state
    if isinstance(inner, list):
        raise UserError(
            f"{path} was written with zero_optimization.elastic_checkpoint, which another layout cannot read: resume in "
            "the layout it was written in, without it, and save once"
        )
    found = {key: value for key, value in inner["state"].get(number, {}).items() if value is not None}
    step = found.pop(STEP, inner["param_groups"][param_group].get(STEP))
    flat = {key: value.reshape(-1) for key, value in found.items() if isinstance(value, Tensor)}
    return flat if step is None else {**flat, STEP: int(step)}


def loss_scale(path: Path) -> dict[str, Any]:
    """State of the loss scaler, empty without one."""
    state = _optimizer_state(path)
    scaler = state.get("loss_scaler")
    values = vars(scaler) if scaler is not None else state
    return {name: values[name] for name in _SCALE if name in values}


def restore_loss_scale(wrapper: Any, saved: dict[str, Any]) -> None:
    """Go on with a saved loss scale, where both the run that saved and this one have one."""
    scaler = getattr(wrapper, "loss_scaler", None) or getattr(wrapper, "loss_scale_config", None)
    for name, value in saved.items():
        if hasattr(scaler, name):
            setattr(scaler, name, value)
