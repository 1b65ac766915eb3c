"""Optimizer and learning-rate schedule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from inrun_megatron.config import TrainingConfig


def parameter_groups(module: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices, with weight decay; biases, norms and other vectors, without.

    `wd_mult` is how Megatron's schedule multiplies the weight decay of a group. ZeRO-3 keeps a parameter's true shape
    in `ds_shape` while it is partitioned.
    """
    decayed: list[torch.nn.Parameter] = []
    plain: list[torch.nn.Parameter] = []
    for parameter in module.parameters():
        if parameter.requires_grad:
            vector = len(getattr(parameter, "ds_shape", parameter.shape)) < 2
            (plain if vector else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay, "wd_mult": 1.0},
        {"params": plain, "weight_decay": 0.0, "wd_mult": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    module: torch.nn.Module, training: TrainingConfig, deepspeed_config: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """AdamW or SGD: DeepSpeed's CPUAdam where the optimizer is offloaded, torch's elsewhere, on a GPU its fused kernel.

    DeepSpeed's FusedAdam would be compiled on first use: it needs the CUDA toolkit, and fails in builder.py (deepspeed
    0.19.8) where TORCH_CUDA_ARCH_LIST names an architecture like 9.0a.
    """
    groups = parameter_groups(module, training.weight_decay)
    if training.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=training.lr, momentum=training.sgd_momentum)
    arguments: dict[str, Any] = {
        "lr": training.lr,
        "betas": (training.adam_beta1, training.adam_beta2),
        "eps": training.adam_eps,
        "weight_decay": training.weight_decay,
    }
    offload = (deepspeed_config.get("zero_optimization") or {}).get("offload_optimizer") or {}
    if offload.get("device", "none") != "none":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **arguments)
    return torch.optim.AdamW(groups, fused=torch.cuda.is_available(), **arguments)


def build_schedule(
    optimizer: torch.optim.Optimizer, training: TrainingConfig, global_batch_size: int
) -> OptimizerParamScheduler:
    """Megatron's schedule, counted in samples: step it by the global batch size after every step that was taken.

    It sets `lr` and `weight_decay` of the optimizer's groups when built and at each step. As in Megatron-LM the first
    step of a warm-up has learning rate 0.
    """
    decay = (training.lr_decay_iters or training.train_iters) * global_batch_size
    if training.lr_warmup_fraction is not None:
        warmup = int(training.lr_warmup_fraction * decay)
    else:
        warmup = training.lr_warmup_iters * global_batch_size
    return OptimizerParamScheduler(
        optimizer,  # type: ignore[arg-type]
        init_lr=0.0,
        max_lr=training.lr,
        min_lr=training.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=decay,
        lr_decay_style=training.lr_decay_style,
        start_wd=training.weight_decay,
        end_wd=training.weight_decay,
        wd_incr_steps=training.train_iters * global_batch_size,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
