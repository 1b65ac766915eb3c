"""The DeepSpeed configuration: `--deepspeed_config FILE.json` with the flags' values in the place of "auto".

A setting may be given by the flags, by the JSON, or by both with the same value. Both with different values is a
UserError that names the two.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inrun_megatron.config import Config
from inrun_megatron.defaults import default_base
from inrun_megatron.errors import UserError
from inrun_megatron.wording import flag_of


@dataclasses.dataclass(frozen=True)
class Batch:
    """How a global batch is made: micro batch x accumulation x data-parallel size."""

    micro: int
    accumulation: int
    data_parallel: int

    @property
    def size(self) -> int:
        """Samples per optimizer step."""
        return self.micro * self.accumulation * self.data_parallel


def read_json(path: str | None) -> dict[str, Any]:
    """The user's JSON; empty without one."""
    if path is None:
        return {}
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--deepspeed_config {path}: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"--deepspeed_config {path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"--deepspeed_config {path} holds no JSON object")
    return content


class _Resolver:
    """Resolves one setting after the other between flags and JSON."""

    def __init__(self, path: str | None, content: dict[str, Any]) -> None:
        self.path = path
        self.merged: dict[str, Any] = json.loads(json.dumps(content))

    def resolve(self, key: str, flag: str, given: Any, default: Any = None) -> Any:
        """The value of the dotted `key`, written into the result. given: the flag's value, None where not given."""
        section = self.merged
        *parents, last = key.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise UserError(f'"{parent}" in {self.path} is {section!r}, not an object')
        stated = section.get(last)
        if stated in (None, "auto"):
            value = default if given is None else given
        elif given is None or stated == given:
            value = stated
            self._check_kind(key, value, default if given is None else given)
        else:
            raise UserError(
                f'{flag} is {given} but "{key}" in {self.path} is {json.dumps(stated)}: '
                f'make them equal or write "auto" in the JSON'
            )
        section[last] = value
        return value

    def _check_kind(self, key: str, value: Any, example: Any) -> None:
        """A number where a number belongs, true or false where a switch does; a text is the flag's."""
        if isinstance(example, str):
            return
        switch = isinstance(example, bool)
        if isinstance(value, bool) != switch or not isinstance(value, (int, float)):
            expected = "true or false" if switch else "a number"
            raise UserError(f'"{key}" in {self.path} is {json.dumps(value)}: write {expected}')


def merge(config: Config, data_parallel: int) -> tuple[Config, dict[str, Any], Batch]:
    """Resolve flags and JSON.

    Returns the configuration with nothing left to the JSON or the layout, the complete DeepSpeed configuration, and the batch.
    UserError: contradictions, a global batch that the ranks cannot share equally, sections this program owns.
    """
    path, training = config.parallel.deepspeed_config, config.training
    content = read_json(path)
    for section, flag in (("optimizer", "--optimizer"), ("scheduler", "--lr-decay-style")):
        if section in content:
            raise UserError(f'"{section}" in {path} is not used: give {flag} and remove the section')
    _refuse_other_writers(content, path)
    _refuse_other_recomputation(content, path)
    _refuse_unread(content, path)
    resolver = _Resolver(path, content)
    batch = _batch(resolver, config, data_parallel)
    clip = resolver.resolve("gradient_clipping", "--clip-grad", training.clip_grad, 1.0)
    bf16 = resolver.resolve("bf16.enabled", "--bf16", training.bf16 or None, False)
    fp16 = resolver.resolve("fp16.enabled", "--fp16", training.fp16 or None, False)
    if bf16 and fp16:
        raise UserError("both bf16 and fp16 are on (flags and DeepSpeed JSON together): choose one")
    stage = resolver.resolve("zero_optimization.stage", "--zero-stage", config.parallel.zero_stage, 0)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"ZeRO stage {stage} does not exist: --zero-stage takes 0, 1, 2 or 3")
    _refuse_lost_predivision(content, path, stage, data_parallel)
    _refuse_mixed_copies(content, path, stage, config.parallel.tensor_model_parallel_size)
    scaling = _loss_scaling(resolver, config) if fp16 else _no_loss_scaling(config)
    _monitors(resolver, config)
    # DeepSpeed's own progress lines would break the progress bar.
    resolver.merged.setdefault("steps_per_print", 10**9)
    # torch's SGD and AdamW are right under ZeRO but not on DeepSpeed's list of tested ones.
    resolver.merged.setdefault("zero_allow_untested_optimizer", True)
    _no_auto_left(resolver.merged, path)
    resolved = dataclasses.replace(
        config,
        training=dataclasses.replace(
            training, global_batch_size=batch.size, clip_grad=float(clip), bf16=bf16, fp16=fp16, **scaling
        ),
        parallel=dataclasses.replace(config.parallel, zero_stage=stage),
        # Resolved here, so that a replay on another number of stages keeps the base point.
        shapley=dataclasses.replace(
            config.shapley,
            base=config.shapley.base or default_base(config.parallel.pipeline_model_parallel_size),
        ),
    )
    return resolved, resolver.merged, batch


def _refuse_other_writers(content: Mapping[str, Any], path: str | None) -> None:
    """Checkpoints are durable once they are saved, and can be mapped into memory."""
    checkpoint = content.get("checkpoint")
    checkpoint = checkpoint if isinstance(checkpoint, Mapping) else {}
    writer = checkpoint.get("writer")
    if isinstance(writer, Mapping) and writer.get("decoupled"):
        raise UserError(
            f'"checkpoint.writer.decoupled" in {path} is {json.dumps(writer["decoupled"])}: it returns before the data is '
            "written, so that a crash could leave a checkpoint that is named and not there; remove it"
        )
    if checkpoint.get("checkpoint_serialization") is False:
        raise UserError(
            f'"checkpoint.checkpoint_serialization" in {path} is false: a resume in another layout could not read such '
            "files; remove it"
        )
    if content.get("datastates_ckpt", False) is not False:
        raise UserError(
            f'"datastates_ckpt" in {path} writes after it returns, so that a crash could leave a checkpoint that is named '
            "and not there; remove it"
        )


def _refuse_other_recomputation(content: Mapping[str, Any], path: str | None) -> None:
    """DeepSpeed's pipeline would recompute the embedding too, whose weight then gets no gradient: its input needs none."""
    section = content.get("pipeline")
    interval = section.get("activation_checkpoint_interval") if isinstance(section, Mapping) else None
    if interval:
        raise UserError(
            f'"pipeline.activation_checkpoint_interval" in {path} is {json.dumps(interval)}: it leaves the embedding '
            "untrained; remove it and give --recompute-granularity full"
        )


def _refuse_unread(content: Mapping[str, Any], path: str | None) -> None:
    """Settings that DeepSpeed knows and that this program's loop does not follow, or would overrule."""
    if content.get("managed_gradient_accumulation") is False:
        raise UserError(
            f'"managed_gradient_accumulation" in {path} is false: every microbatch would be an optimizer step; remove it'
        )
    if "bfloat16" in content:  # "bf16", which is always written, hides it
        raise UserError(f'"bfloat16" in {path} is an old name that would be ignored: write "bf16"')
    zero = content.get("zero_optimization")
    for key, name in (("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param")):
        if isinstance(zero, Mapping) and zero.get(key):
            raise UserError(
                f'"zero_optimization.{key}" in {path} is an old name: write "{name}": {{"device": "cpu"}}'
            )
    efficiency = content.get("data_efficiency")
    if isinstance(efficiency, Mapping) and efficiency.get("enabled"):
        raise UserError(
            f'"data_efficiency" in {path} is for DeepSpeed\'s own data loader and layers and would be ignored; remove it'
        )
    autocast = content.get("torch_autocast")
    if isinstance(autocast, Mapping) and autocast.get("enabled"):
        raise UserError(
            f'"torch_autocast" in {path} gives megatron-core\'s layers inputs of another precision than their weights; remove '
            'it and use "bf16" or "fp16" (--bf16, --fp16)'
        )


def _refuse_lost_predivision(
    content: Mapping[str, Any], path: str | None, stage: int, data_parallel: int
) -> None:
    """deepspeed 0.19 (runtime/zero/stage3.py) divides by the factor, and multiplies by it again unless it is the number of replicas."""
    factor = content.get("gradient_predivide_factor")
    if stage == 3 and factor == data_parallel and data_parallel > 1 and not content.get("prescale_gradients"):
        raise UserError(
            f'"gradient_predivide_factor" in {path} is {factor:g}, as are the data-parallel ranks: at ZeRO stage 3 DeepSpeed '
            "divides gradients by it and never multiplies them again; remove it"
        )


def _refuse_mixed_copies(
    content: Mapping[str, Any], path: str | None, stage: int, tensor_parallel: int
) -> None:
    """deepspeed 0.19 (utils/groups.py) makes hpZ's groups of neighbouring ranks, whatever these hold of the model."""
    zero = content.get("zero_optimization")
    ranks = zero.get("zero_hpz_partition_size", 1) if isinstance(zero, Mapping) else 1
    if stage == 3 and tensor_parallel > 1 and ranks != 1:
        raise UserError(
            f'"zero_optimization.zero_hpz_partition_size" in {path} is {json.dumps(ranks)} with '
            f"--tensor-model-parallel-size {tensor_parallel}: DeepSpeed shares the further copy of the weights among "
            "neighbouring ranks, which hold other shards of a layer, and mixes them up; remove it"
        )


def _batch(resolver: _Resolver, config: Config, data_parallel: int) -> Batch:
    training = config.training
    micro = training.micro_batch_size
    per_pass = micro * data_parallel
    size = per_pass if training.global_batch_size is None else training.global_batch_size
    if micro < 1 or size < 1 or size % per_pass:
        raise UserError(
            f"--global-batch-size {size} is no multiple of --micro-batch-size {micro} x {data_parallel} "
            f"data-parallel ranks = {per_pass}"
        )
    accumulation = size // per_pass
    resolver.resolve("train_micro_batch_size_per_gpu", "--micro-batch-size", micro)
    steps = f"--global-batch-size {size} / (--micro-batch-size {micro} x {data_parallel} data-parallel ranks)"
    resolver.resolve("gradient_accumulation_steps", steps, accumulation)
    resolver.resolve("train_batch_size", "--global-batch-size", size)
    return Batch(micro=micro, accumulation=accumulation, data_parallel=data_parallel)


def _loss_scaling(resolver: _Resolver, config: Config) -> dict[str, Any]:
    training = config.training
    power = None
    if training.initial_loss_scale is not None:
        power = math.log2(training.initial_loss_scale) if training.initial_loss_scale > 0 else 0.5
        if power == math.inf or power != int(power):
            raise UserError(f"--initial-loss-scale {training.initial_loss_scale} is no power of 2")
        power = int(power)
    scaling = {
        "loss_scale": float(resolver.resolve("fp16.loss_scale", "--loss-scale", training.loss_scale, 0)),
        "initial_loss_scale": 2.0
        ** resolver.resolve("fp16.initial_scale_power", "log2 of --initial-loss-scale", power, 16),
        "min_loss_scale": float(
            resolver.resolve("fp16.min_loss_scale", "--min-loss-scale", training.min_loss_scale, 1)
        ),
        "loss_scale_window": resolver.resolve(
            "fp16.loss_scale_window", "--loss-scale-window", training.loss_scale_window, 1000
        ),
        "hysteresis": resolver.resolve("fp16.hysteresis", "--hysteresis", training.hysteresis, 2),
    }
    for name, value in scaling.items():
        if (
            value < 0 or value == math.inf or (value == 0 and name != "loss_scale")
        ):  # a fixed scale of 0: a dynamic one
            raise UserError(f"{flag_of(name)} is {value:g}: it must be positive and finite")
    return scaling


def _no_loss_scaling(config: Config) -> dict[str, Any]:
    for name in ("loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis"):
        value = getattr(config.training, name)
        if value is not None:
            raise UserError(f"{flag_of(name)} {value} needs --fp16: nothing else scales the loss")
    return {}


def _monitors(resolver: _Resolver, config: Config) -> None:
    logging = config.logging
    for section, key, flag, given in (
        ("tensorboard", "output_path", "--tensorboard-dir", logging.tensorboard_dir),
        ("csv_monitor", "output_path", "--csv-dir", logging.csv_dir),
        ("wandb", "project", "--wandb-project", logging.wandb_project),
    ):
        if given is None:
            continue
        resolver.resolve(f"{section}.{key}", flag, given)
        monitor = resolver.merged[section]
        if monitor.get("enabled") in (None, "auto"):
            monitor["enabled"] = True
        if monitor["enabled"] is not True:
            raise UserError(
                f'{flag} is {given} but "{section}.enabled" in {resolver.path} is {json.dumps(monitor["enabled"])}: '
                f"write true, or leave {flag} out"
            )
        if section != "wandb":
            monitor.setdefault("job_name", "train")
    if logging.wandb_exp_name is not None:
        if not (resolver.merged.get("wandb") or {}).get("enabled"):
            raise UserError(f"--wandb-exp-name {logging.wandb_exp_name} needs --wandb-project")
        resolver.resolve("wandb.group", "--wandb-exp-name", logging.wandb_exp_name)


def _no_auto_left(content: Mapping[str, Any], path: str | None, prefix: str = "") -> None:
    for key, value in content.items():
        if isinstance(value, Mapping):
            _no_auto_left(value, path, f"{prefix}{key}.")
        elif value == "auto":
            raise UserError(f'"{prefix}{key}" in {path} is "auto", but no flag decides it: write a value')
