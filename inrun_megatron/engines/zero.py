"""DeepSpeed's engine as scoring sees it: flat groups, clip coefficient, loss scale, and what is refused.

What is not public of DeepSpeed's engines and optimizers is touched in this directory only, and all of its optimizers in
the three files zero.py, zero_groups.py and zero_files.py; ``tests/test_canary.py`` fails when one of these names moves.
Upstream (deepspeed 0.19): runtime/engine.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..parallel import Layout
from .gradients import keep_fp32_norm, mark_tensor_parallel_gradients
from .zero_groups import OptimizerState


class ZeroAdapter(OptimizerState):
    """What scoring needs to know of a ``deepspeed.initialize``-d engine beside its optimizer's state.

    UserError where scoring would be wrong with this engine.
    """

    def __init__(self, engine: Any, layout: Layout) -> None:
        _refuse_unsupported(engine, layout)
        super().__init__(engine, layout)
        self._require_all_stepped()
        self._sizes = self._group_sizes()
        if self.is_bare:
            keep_fp32_norm(engine)
        elif hasattr(engine.optimizer, "fp32_groups") and layout.tp_size > 1:
            # FP16_UnfusedOptimizer's norm, and so c_t, would be of one rank's shards.
            mark_tensor_parallel_gradients(engine.module)

    def _require_all_stepped(self) -> None:
        stepped = {id(span.parameter): span.parameter for group in self.groups for span in group.spans}
        named = list(self.engine.module.named_parameters())
        left = [name for name, p in named if p.requires_grad and id(p) not in stepped]
        if left:
            raise UserError(
                f"the optimizer does not step {', '.join(left[:5])}{', ...' if len(left) > 5 else ''}, which need gradients: "
                f"give it to the optimizer or freeze it (requires_grad=False)"
            )
        strangers = stepped.keys() - {id(p) for _, p in named}
        if strangers:
            shapes = ", ".join(str(tuple(stepped[key].shape)) for key in list(strangers)[:5])
            raise UserError(
                f"the optimizer steps parameters that are not in the engine's module ({len(strangers)}, of shape {shapes}), where no "
                f"tap sees them: move them into the module, in a layer that can be tapped, or leave them out of the optimizer"
            )

    def _group_sizes(self) -> list[int]:
        """Parameters of every group of the optimizer, where it steps the layers' own; its wrappers show one at a time."""
        return [len(group["params"]) for group in self.inner.param_groups] if self.is_bare else []

    def require_unchanged(self) -> None:
        """Raise UserError where the optimizer has got further parameters since: no tap sees them."""
        if self._group_sizes() != self._sizes:
            raise UserError(
                f"the optimizer has parameter groups of {self._group_sizes()} parameters, and had {self._sizes} when InRunShapley "
                f"was made; close() before a model is changed, and make a new InRunShapley afterwards"
            )

    @property
    def gradient_accumulation_steps(self) -> int:
        """Microbatches of one optimizer step on this rank."""
        return int(self.engine.gradient_accumulation_steps())

    @property
    def gradient_divisor(self) -> int:
        """What DeepSpeed divides the sum of the data-parallel ranks' gradients by."""
        return self.layout.dp_size if self.engine.gradient_average else 1  # gradient_allreduce_op: mean, sum

    def loss_scale(self) -> float:
        """What DeepSpeed multiplies the loss by before backward (1 unless fp16)."""
        if not self.engine.fp16_enabled():
            return 1.0
        return float(self.engine.optimizer.loss_scale)

    def coming_unscale(self) -> float:
        """What DeepSpeed will divide the coming step's gradients by, if they do not overflow.

        Its ZeRO optimizers update a dynamic loss scale first and unscale then, so that this is the scale of the next step:
        twice the ``loss_scale`` of this one's backward where a window without overflow ends.
        """
        scale = self.loss_scale()
        wrapper: Any = self.engine.optimizer
        if not self.engine.fp16_enabled() or wrapper.custom_loss_scaler or not wrapper.loss_scaler.dynamic:
            return scale
        scaler = wrapper.loss_scaler
        stable = scaler.cur_iter - scaler.last_overflow_iter - 1
        grows = stable > 0 and stable % scaler.scale_window == 0
        return scale * float(scaler.scale_factor) if grows else scale

    def gradient_norm(self, received: float = 1.0) -> Tensor | None:
        """Norm of the gradient that the optimizer received, before clipping, fp64 on the device; None where DeepSpeed did
        not compute one.

        Args:
            received: loss scale of the step's backward over ``coming_unscale``, which stages 1 and 2 leave out of the norm.
        """
        norm = self.engine.get_global_grad_norm()
        device = self.groups[0].device
        if norm is None:
            return None
        if not isinstance(norm, Tensor):
            norm = torch.full((), norm, dtype=torch.float64, device=device)
        norm = norm.detach().reshape(()).to(device, torch.float64)
        return norm if self.stage == 3 else norm * received

    def norm_on_host(self) -> float | None:
        """The same where the host has it already: from fp32 clipping at stage 0."""
        norm: float | None = self.engine.get_global_grad_norm() if self.is_bare else None
        return norm

    @property
    def clip_threshold(self) -> float:
        """The norm that DeepSpeed clips to, 0: none. Its optimizers keep their own, which is a loaded checkpoint's."""
        return float(getattr(self.engine.optimizer, "clip_grad", self.engine.gradient_clipping()))

    def clip_coefficients(self, norms: Tensor) -> Tensor:
        """``1 / max(1, (norm + 1e-6) / clip)``: what DeepSpeed would multiply gradients of these norms by."""
        clip = self.clip_threshold
        return torch.ones_like(norms) if clip <= 0.0 else ((norms + 1e-6) / clip).clamp(min=1.0).reciprocal()

    @property
    def steps_taken(self) -> int:
        """Optimizer steps of the engine, skipped ones too."""
        return int(self.engine.global_steps)

    def step_applied(self) -> bool:
        """Did the last step move the weights? Not where gradients overflowed."""
        return bool(self.engine.was_step_applied())


def _refuse_unsupported(engine: Any, layout: Layout) -> None:
    if engine.optimizer is None:
        raise UserError("the DeepSpeed engine has no optimizer; scoring needs the step that is taken")
    _refuse_other_ranks(engine, layout)
    stage = int(engine.zero_optimization_stage())
    if stage == 3:
        _refuse_partitioned(engine, layout)
    if engine.fp16_enabled() and stage == 0:
        raise UserError(
            "fp16 at ZeRO stage 0: DeepSpeed 0.19 divides gradients by a loss scale that engine.backward() never "
            "multiplied the loss by; use ZeRO stage 1, 2 or 3 for fp16"
        )
    device = _device(engine.zero_offload_param())
    if device != "none":
        raise UserError(
            f"ZeRO-3 parameter offload to {device} is not supported while scoring; remove zero_optimization.offload_param"
        )
    refuse_offload(engine.zero_offload_optimizer())
    if getattr(engine, "zenflow", False):
        raise UserError(
            "ZenFlow steps parts of the model at other times; remove zero_optimization.zenflow to score"
        )
    if engine.torch_autocast_enabled():
        raise UserError(
            "torch_autocast is not supported while scoring; use bf16 or fp16 in the DeepSpeed config"
        )


def _refuse_other_ranks(engine: Any, layout: Layout) -> None:
    """The engine's ranks must be the layout's."""
    if layout.pp_size > 1 and not engine.pipeline_parallelism:
        raise UserError(
            f"pipeline parallel size {layout.pp_size} needs a DeepSpeed PipelineModule; the engine has none"
        )
    if engine.sequence_parallel_size > 1:
        raise UserError(
            f"DeepSpeed's sequence parallel size {engine.sequence_parallel_size} lets ranks share samples as if they were "
            "other replicas; use Megatron's sequence parallelism, over the tensor-parallel ranks, to score"
        )
    if engine.dp_world_size != layout.dp_size:
        raise UserError(
            f"the engine has {engine.dp_world_size} data-parallel ranks, the layout {layout.dp_size}: pass the engine's groups "
            "as layout=Layout(...), or give the engine those of megatron.core.parallel_state (mpu=, topology=)"
        )


def _refuse_partitioned(engine: Any, layout: Layout) -> None:
    """What goes wrong at ZeRO stage 3 only."""
    leaves = [name for name, module in engine.module.named_modules() if getattr(module, "_z3_leaf", False)]
    if leaves:
        raise UserError(
            f"ZeRO-3 leaf module {leaves[0] or type(engine.module).__name__}: DeepSpeed reduces the gradients of a leaf module "
            f"after every backward through it, also after the detached ones of scoring; leave out set_z3_leaf_modules and "
            f'stage3_module_granularity_threshold, and set zero_optimization.leaf_module to {{"classes": []}}, as DeepSpeed marks '
            f"some mixtures of experts by itself"
        )
    predivided = engine.gradient_predivide_factor()
    if engine.postscale_gradients() and predivided == layout.dp_size != 1:
        raise UserError(
            f"gradient_predivide_factor {predivided:g} at ZeRO stage 3 with as many data-parallel ranks: DeepSpeed 0.19 divides "
            f"gradients by it and never multiplies them again; leave it out"
        )
    copies = engine.zero_hpz_partition_size()
    if copies > 1 and layout.tp_size > 1:
        raise UserError(
            f"zero_hpz_partition_size {copies} with tensor parallel size {layout.tp_size}: DeepSpeed 0.19 shares the further "
            f"copy of the weights among neighbouring ranks, which hold other shards of a layer, and mixes them up; leave it out"
        )


def refuse_offload(config: Any) -> None:
    """The optimizer's whole state must be in memory between steps, and one optimizer take them all.

    Args:
        config: DeepSpeed's section of optimizer offload, or None.

    Raises:
        UserError: it is not, or several optimizers share the steps.
    """
    where = "zero_optimization.offload_optimizer"
    if _device(config) == "nvme":
        raise UserError(f"{where}.device nvme keeps masters and moments in files; offload to cpu to score")
    if _device(config) != "none" and (config.ratio < 1.0 or config.super_offload):
        setting = "super_offload true" if config.super_offload else f"ratio {config.ratio:g}"
        raise UserError(
            f"{where}.{setting}: a further optimizer, whose state scoring does not see, steps a part of the model; "
            f"leave it out to score"
        )


def _device(offload: Any) -> str:
    """Where an offload section of the configuration, or None, sends things."""
    return "none" if offload is None else str(getattr(offload.device, "value", offload.device))
