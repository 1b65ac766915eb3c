"""Where DeepSpeed's optimizers (ZeRO 0-3, BF16, FP16) keep every parameter's master weight and moments.

Upstream (deepspeed 0.19): runtime/zero/stage_1_and_2.py, runtime/zero/stage3.py, runtime/bf16_optimizer.py,
runtime/fp16/fused_optimizer.py, runtime/fp16/unfused_optimizer.py. `tests/test_canary.py` fails when a name moves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..parallel import Layout
from .shards import FlatGroup, Piece, Residence, Span

# As Python spells the name that the class keeps to itself.
_FETCHES = "_DeepSpeedZeRoOffload__allgather_stream"


class OptimizerState:
    """The optimizer of a ``deepspeed.initialize``-d engine as flat groups.

    Attributes:
        engine: the DeepSpeed engine.
        layout: this rank's place.
        stage: ZeRO stage.
        inner: the optimizer that takes the step (torch's or DeepSpeed's Adam, SGD, ...).
        groups: where every trainable parameter lies; same order on all ranks.
    """

    def __init__(self, engine: Any, layout: Layout) -> None:
        self.engine, self.layout = engine, layout
        self.stage = int(engine.zero_optimization_stage())
        wrapper = engine.optimizer
        self.inner: torch.optim.Optimizer = getattr(wrapper, "optimizer", wrapper)
        self.groups = _groups(wrapper, self.inner, layout)

    @property
    def is_bare(self) -> bool:
        """Stage 0 in fp32: the optimizer steps the layers' own parameters, without any wrapper."""
        return self.inner is self.engine.optimizer

    def param_group(self, piece: Piece) -> dict[str, Any]:
        """The hyperparameters that a piece is stepped with."""
        return self.inner.param_groups[piece.param_group]

    def pieces(self) -> list[tuple[FlatGroup, Piece]]:
        """All pieces in the order in which the inner optimizer's ``state_dict`` numbers them."""
        all_of_them = [(group, piece) for group in self.groups for piece in group.pieces]
        return sorted(all_of_them, key=lambda pair: pair[1].param_group)

    @contextmanager
    def with_parameters(self) -> Iterator[None]:
        """ZeRO-3 leaves the inner optimizer without parameters between steps: lend it what it steps."""
        if self.stage != 3:
            yield
            return
        self.engine.optimizer._set_fp32_optimizer_param_groups()
        try:
            yield
        finally:
            self.engine.optimizer._clear_fp32_optimizer_param_groups()

    def release_gathered_weights(self) -> None:
        """ZeRO-3: let go of weights that a pass without parameter gradients left gathered.

        DeepSpeed releases a module whose inputs need no gradient (the embedding) when its gradient is
        reduced, which never happens in a detached pass.
        """
        if self.stage == 3:
            self.engine.optimizer._partition_all_parameters()

    def forget_gathered_weights(self) -> None:
        """ZeRO-3: the shards were written to, so what was gathered from them is stale, on this rank and within its node.

        With ``zero_hpz_partition_size`` ranks of a node keep a second copy of the weights, which DeepSpeed drops after its
        own steps only. Its fetches run in a stream of their own (``overlap_comm``, at stage 3 the default), which waits for
        no other: after DeepSpeed's own steps the host has waited for the whole device. Here it has not.
        """
        self.release_gathered_weights()
        if self.stage == 3:
            self.engine.optimizer.invalidate_secondary_tensor()
            fetches = getattr(self.engine.optimizer.parameter_offload, _FETCHES)
            if fetches is not None:  # on a GPU
                fetches.wait_stream(torch.cuda.current_stream())


def _groups(wrapper: Any, inner: torch.optim.Optimizer, layout: Layout) -> list[FlatGroup]:
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):
        return _stage3_groups(wrapper)
    if hasattr(wrapper, "bit16_groups_flat"):
        masters = wrapper.single_partition_of_fp32_groups
        return _flat_groups(wrapper.bit16_groups, wrapper.bit16_groups_flat, masters, layout)
    if hasattr(wrapper, "bf16_groups_flat"):
        masters = wrapper.fp32_groups_flat_partition
        return _flat_groups(wrapper.bf16_groups, wrapper.bf16_groups_flat, masters, layout)
    if hasattr(wrapper, "fp16_groups_flat"):  # FP16_Optimizer: fp16 or bf16 at stage 0, fused Adam
        return _flat_groups(wrapper.fp16_groups, wrapper.fp16_groups_flat, wrapper.fp32_groups_flat, None)
    if hasattr(wrapper, "fp32_groups"):  # FP16_UnfusedOptimizer: the same with any other optimizer
        return _loose_groups(wrapper.fp16_groups, wrapper.fp32_groups)
    own = [[p for p in group["params"] if p.requires_grad] for group in inner.param_groups]
    return _loose_groups(own, own)


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
        if not members:  # a parameter group whose members are all frozen
            continue
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
