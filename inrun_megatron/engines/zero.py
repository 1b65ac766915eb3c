"""DeepSpeed's optimizers (ZeRO 0-3, BF16, FP16) as flat groups, their clip coefficient and loss scale.

Everything of DeepSpeed that is not public is touched in this file only; ``tests/test_canary.py`` fails when
one of these names moves. Upstream (deepspeed 0.19): runtime/zero/stage_1_and_2.py, runtime/zero/stage3.py,
runtime/bf16_optimizer.py, runtime/fp16/fused_optimizer.py, runtime/fp16/unfused_optimizer.py, runtime/engine.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..errors import UserError
from ..parallel import Layout
from .gradients import mark_tensor_parallel_gradients, watch_fp32_clipping
from .shards import FlatGroup, Piece, Residence, Span


class ZeroAdapter:
    """What scoring needs to know of a ``deepspeed.initialize``-d engine.

    Attributes:
        engine: the DeepSpeed engine.
        inner: the optimizer that takes the step (torch's or DeepSpeed's Adam, SGD, ...).
        groups: where every trainable parameter lies; same order on all ranks.
    """

    def __init__(self, engine: Any, layout: Layout) -> None:
        self.engine = engine
        self.layout = layout
        _refuse_unsupported(engine, layout)
        wrapper = engine.optimizer
        self.stage = int(engine.zero_optimization_stage())
        self.inner: torch.optim.Optimizer = getattr(wrapper, "optimizer", wrapper)
        self._fp32_norm: float | None = None
        if hasattr(wrapper, "fp32_partitioned_groups_flat"):
            self.groups = _stage3_groups(wrapper)
        elif hasattr(wrapper, "bit16_groups_flat"):
            self.groups = _flat_groups(
                wrapper.bit16_groups,
                wrapper.bit16_groups_flat,
                wrapper.single_partition_of_fp32_groups,
                layout,
            )
        elif hasattr(wrapper, "bf16_groups_flat"):
            self.groups = _flat_groups(
                wrapper.bf16_groups, wrapper.bf16_groups_flat, wrapper.fp32_groups_flat_partition, layout
            )
        elif hasattr(wrapper, "fp16_groups_flat"):  # FP16_Optimizer: fp16 or bf16 at stage 0, fused Adam
            self.groups = _flat_groups(
                wrapper.fp16_groups, wrapper.fp16_groups_flat, wrapper.fp32_groups_flat, None
            )
        elif hasattr(wrapper, "fp32_groups"):  # FP16_UnfusedOptimizer: the same with any other optimizer
            if layout.tp_size > 1:
                mark_tensor_parallel_gradients(
                    engine.module
                )  # its norm, and so c_t, would be of one rank's shards
            self.groups = _loose_groups(wrapper.fp16_groups, wrapper.fp32_groups)
        else:  # stage 0 in fp32: the optimizer itself
            own = [[p for p in g["params"] if p.requires_grad] for g in self.inner.param_groups]
            self.groups = _loose_groups(own, own)
            self._watch_fp32_clipping()

    def _watch_fp32_clipping(self) -> None:
        """At stage 0 in fp32 DeepSpeed clips without keeping the norm: clip in the same way and keep it."""

        def keep(norm: float) -> None:
            self._fp32_norm = norm

        watch_fp32_clipping(self.engine, keep)

    def param_group(self, piece: Piece) -> dict[str, Any]:
        return self.inner.param_groups[piece.param_group]

    @property
    def gradient_accumulation_steps(self) -> int:
        return int(self.engine.gradient_accumulation_steps())

    def loss_scale(self) -> float:
        """What DeepSpeed multiplies the loss by before backward (1 unless fp16)."""
        if not self.engine.fp16_enabled():
            return 1.0
        return float(self.engine.optimizer.loss_scale)

    def gradient_norm(self) -> Tensor | None:
        """Norm of the step's gradient before clipping, fp64 on the device; None where DeepSpeed did not compute one."""
        norm = self._fp32_norm if self._fp32_norm is not None else self.engine.get_global_grad_norm()
        device = self.groups[0].device
        if norm is None or isinstance(norm, Tensor):
            return None if norm is None else norm.detach().reshape(()).to(device, torch.float64)
        return torch.full((), norm, dtype=torch.float64, device=device)

    def clip_coefficients(self, norms: Tensor) -> Tensor:
        """``1 / max(1, (norm + 1e-6) / clip)``: what DeepSpeed would multiply gradients of these norms by."""
        clip = float(self.engine.gradient_clipping())
        return torch.ones_like(norms) if clip <= 0.0 else ((norms + 1e-6) / clip).clamp(min=1.0).reciprocal()

    def step_applied(self) -> bool:
        return bool(self.engine.was_step_applied())

    def release_gathered_weights(self) -> None:
        """ZeRO-3: let go of weights that a pass without parameter gradients left gathered.

        DeepSpeed releases a module whose inputs need no gradient (the embedding) when its gradient is
        reduced, which never happens in a detached pass.
        """
        if self.stage == 3:
            self.engine.optimizer._partition_all_parameters()


def _refuse_unsupported(engine: Any, layout: Layout) -> None:
    if engine.optimizer is None:
        raise UserError("the DeepSpeed engine has no optimizer; scoring needs the step that is taken")
    if layout.pp_size > 1 and not engine.pipeline_parallelism:
        raise UserError(
            f"pipeline parallel size {layout.pp_size} needs a DeepSpeed PipelineModule; the engine has none"
        )
    stage = int(engine.zero_optimization_stage())
    if engine.fp16_enabled() and stage == 0:
        raise UserError(
            "fp16 at ZeRO stage 0: DeepSpeed 0.19 divides gradients by a loss scale that engine.backward() never "
            "multiplied the loss by; use ZeRO stage 1, 2 or 3 for fp16"
        )
    config = engine.zero_offload_param() if hasattr(engine, "zero_offload_param") else None
    device = getattr(getattr(config, "device", None), "value", None)
    if device not in (None, "none"):
        raise UserError(
            f"ZeRO-3 parameter offload to {device} is not supported while scoring; remove zero_optimization.offload_param"
        )
    if getattr(engine, "zenflow", False):
        raise UserError(
            "ZenFlow steps parts of the model at other times; remove zero_optimization.zenflow to score"
        )
    if engine.torch_autocast_enabled():
        raise UserError(
            "torch_autocast is not supported while scoring; use bf16 or fp16 in the DeepSpeed config"
        )


def _flat_groups(
    parameters: list[list[Parameter]], flats: list[Tensor], masters: list[Tensor], layout: Layout | None
) -> list[FlatGroup]:
    """Parameters that are views into one flat buffer per group; offsets are read off their storage.

    With a ``layout`` the buffer is cut into dp equal parts (ZeRO-1/2, BF16), without one every rank holds
    all of it (stage 0).
    """
    groups = []
    for index, (members, flat, master) in enumerate(zip(parameters, flats, masters, strict=True)):
        spans = []
        for p in members:
            assert p.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
            spans.append(Span(p, int(p.storage_offset() - flat.storage_offset()), p.numel()))
        parts, place = (1, 0) if layout is None else (layout.dp_size, layout.dp_rank)
        size = flat.numel() // parts
        assert size == master.numel(), "the optimizer's partition is not the dp-th part of the flat group"
        groups.append(
            FlatGroup(
                residence=Residence.REPLICATED if parts == 1 else Residence.FLAT,
                numel=flat.numel(),
                start=place * size,
                stop=(place + 1) * size,
                spans=spans,
                device=flat.device,
                pieces=[Piece(master, index, 0, size)],
                flat=flat,
            )
        )
    return groups


def _loose_groups(parameters: list[list[Parameter]], masters: list[list[Any]]) -> list[FlatGroup]:
    """Parameters that the optimizer steps one by one (stage 0): laid out one after another here."""
    groups = []
    for index, (members, own) in enumerate(zip(parameters, masters, strict=True)):
        offset, spans, pieces = 0, [], []
        for p, master in zip(members, own, strict=True):
            spans.append(Span(p, offset, p.numel()))
            pieces.append(Piece(master, index, offset, p.numel()))
            offset += p.numel()
        groups.append(
            FlatGroup(Residence.REPLICATED, offset, 0, offset, spans, members[0].device, pieces=pieces)
        )
    return groups


def _stage3_groups(wrapper: Any) -> list[FlatGroup]:
    """Sub-groups of ZeRO-3: every parameter's own dp-th part, one after another."""
    groups = []
    for index, (members, flat) in enumerate(
        zip(wrapper.fp16_groups, wrapper.fp32_partitioned_groups_flat, strict=True)
    ):
        spans = []
        for p in members:
            owner, offset, numel = wrapper.grad_position[wrapper.get_param_id(p)]
            assert owner == index
            spans.append(Span(p, offset, numel))
        groups.append(
            FlatGroup(
                residence=Residence.PARTITIONED,
                numel=flat.numel(),
                start=0,
                stop=flat.numel(),
                spans=spans,
                device=members[0].device,
                pieces=[Piece(flat, wrapper.sub_group_to_group_id[index], 0, flat.numel())],
            )
        )
    return groups
