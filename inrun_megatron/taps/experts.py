"""Taps for megatron-core's mixture-of-experts layers: the router, and experts that are MLPs of parallel linear layers.

Tokens are permuted so that an expert's are neighbours, in the order in which they lie in ``[s, b, h]`` (moe_utils.permute, after
a gather over tensor-parallel ranks' shards of the sequence): the router's map says which they are. Losses that balance experts
reach the router's logits token by token (moe_utils.MoEAuxLossAutoScaler), with the experts' loads as constants, so that they are
part of a sample's gradient. Upstream: megatron/core/transformer/moe; ``tests/test_canary.py`` fails if these names move.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import Router, TopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from torch import Tensor, nn

from ..errors import UserError
from .attach import Taps, register
from .emission import Site
from .linear import LinearCall, linear
from .own_forward import around
from .plain import place, tensor_parallel_place
from .routing import Routed, Routing

ROUTER_TYPES = {None: None, "fp32": torch.float32, "fp64": torch.float64}
"""``moe_router_dtype``."""


class Experts:
    """One mixture-of-experts layer: between its router's forward and its experts'."""

    def __init__(self, taps: Taps, group: dist.ProcessGroup, sharded: bool) -> None:
        self._taps, self._group, self._sharded = taps, group, sharded
        self._map: Tensor | None = None
        self._now: Routing | None = None

    def route(self, routed: Tensor) -> None:
        """The router's map ``[T(/tp), E]`` of the microbatch whose forward runs."""
        self._map = routed

    def dispatch(self, hidden: Tensor, tokens_per_expert: Tensor) -> None:
        """Experts are about to see these tokens ``[n, h]``, so many each."""
        run, own = self._taps.current, self._map
        self._now, self._map = None, None
        # A checkpoint's first forward has no backward.
        wanted = run.routes if run is not None and torch.is_grad_enabled() else []
        if not wanted:
            return
        assert own is not None, "experts ran without their router"
        # A single expert's number may still be on the device; of several it is on the host, where the tokens are split.
        sizes = [len(hidden)] if own.shape[1] == 1 else tokens_per_expert.numpy().tolist()
        self._now = Routing.of_map(self._whole(own), sizes)
        for route in wanted:
            route(self._now)

    def _whole(self, own: Tensor) -> Tensor:
        """Of all shards of the sequence: a byte per token and expert."""
        own = own.bool()
        if not self._sharded:
            return own
        ranks = dist.get_world_size(self._group)
        shards = own.new_empty((ranks * len(own), own.shape[1]), dtype=torch.uint8)
        dist.all_gather_into_tensor(shards, own.to(torch.uint8), group=self._group)
        return shards.bool()

    def routed(self, expert: int) -> Routed | None:
        """What one of them sees, where a consumer asked."""
        return None if self._now is None else Routed(self._now, expert)


@register(MoELayer)
def _layer(taps: Taps, module: Any, name: str) -> None:
    config = module.config
    if dist.get_world_size(module.ep_group) > 1:
        raise UserError(
            f"layer {name} has its experts on several ranks (expert parallelism), which has no tap yet: use "
            f"expert_model_parallel_size=1"
        )
    if type(module.experts) is not SequentialMLP:
        raise UserError(
            f"layer {name} has experts of type {type(module.experts).__name__}, which have no tap yet: use SequentialMLP "
            f"(get_gpt_layer_local_spec(num_experts=..., moe_grouped_gemm=False))"
        )
    for setting, value in _UNTAPPED.items():
        if getattr(config, setting, value[0]) not in value:
            raise UserError(
                f"layer {name} has {setting}={getattr(config, setting)!r}, which has no tap yet: use {value[0]!r}"
            )
    if config.add_bias_linear:
        raise UserError(
            f"layer {name} has experts with biases, which have no tap yet: use add_bias_linear=False"
        )
    if dist.get_world_size(module.experts.tp_group) != dist.get_world_size(module.attn_tp_group):
        raise UserError(
            f"layer {name} splits its experts over other ranks than attention, which has no tap yet: leave "
            f"expert_tensor_parallel_size out"
        )
    group = module.attn_tp_group
    experts = Experts(taps, group, config.sequence_parallel and dist.get_world_size(group) > 1)
    _tap_router(taps, module.router, f"{name}.router", experts)
    _watch_experts(taps, module.experts, f"{name}.experts", experts)


@register(SharedExpertMLP)
def _shared_expert(taps: Taps, module: Any, name: str) -> None:
    """Its gate, if it has one; its linear layers have taps of their own."""
    weight = module.gate_weight
    if weight is None or not weight.requires_grad:
        return
    site = Site(f"{name}.gate_weight", "linear", place(weight), 1, *tensor_parallel_place())

    def gate(input: Tensor) -> Tensor:
        return linear(input, LinearCall(site, taps.current, weight))

    module.forward = around(module, nn.Linear, weight, None, gate)
    taps.cover(site.sharding, weight)


@register(TopKRouter, refuses=True)
def _router(taps: Taps, module: Any, name: str) -> None:
    """Its layer taps it."""


_UNTAPPED: dict[str, tuple[Any, ...]] = {
    "moe_token_dispatcher_type": ("allgather", "alltoall"),
    "moe_pad_expert_input_to_capacity": (False, None),
    "moe_latent_size": (None,),
    "moe_shared_expert_overlap": (False, None),
}
"""Settings, and those of their values that taps know."""


def _tap_router(taps: Taps, module: TopKRouter, name: str, experts: Experts) -> None:
    if type(module).gating is not Router.gating:
        raise UserError(
            f"layer {name} is a {type(module).__name__} with a gating of its own, and the tap would undo that: put what it does "
            f"around the product into its forward, or freeze its weight and gate elsewhere"
        )

    def attach(_: Taps, router: Any, __: str) -> None:
        own = type(router).forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            run = taps.current
            with _counts_kept(router, run is not None and run.detached):
                probabilities, routed = own(router, *args, **kwargs)
            experts.route(routed)
            return probabilities, routed

        router.forward = forward
        if router.weight.requires_grad:
            site = Site(name, "linear", place(router.weight), 1, *tensor_parallel_place())
            dtype = ROUTER_TYPES[router.config.moe_router_dtype]

            def gating(input: Tensor) -> Tensor:
                return linear(input, LinearCall(site, taps.current, router.weight, dtype=dtype))

            router.gating = gating
            taps.cover(site.sharding, router.weight)

    taps.attach(module, name, attach)


@contextmanager
def _counts_kept(router: Any, detached: bool) -> Iterator[None]:
    """A detached pass leaves no trace in what routers count: loads, for their biases and for balance over a whole batch, and the
    log of their losses."""
    if not detached:
        yield
        return
    log = logged_losses()
    counts = [*(b for b in router._buffers.values() if b is not None), *log.values()]
    before = [count.clone() for count in counts]
    try:
        yield
    finally:
        for count, value in zip(counts, before, strict=True):
            count.copy_(value)
        for name, values in logged_losses().items():
            if name not in log:  # begun in this pass
                values.zero_()


def logged_losses() -> dict[str, Tensor]:
    """What megatron-core has added up of routers' losses for its log, by layer ``[L]``; by name."""
    if hasattr(moe_utils, "get_moe_metrics_tracker"):  # since 0.17
        return {name: entry.values for name, entry in moe_utils.get_moe_metrics_tracker().metrics.items()}
    log = moe_utils.get_moe_layer_wise_logging_tracker()
    return {name: entry["values"] for name, entry in log.items()}


def _watch_experts(taps: Taps, module: SequentialMLP, name: str, experts: Experts) -> None:
    def attach(_: Taps, mlp: Any, __: str) -> None:
        own = type(mlp).forward

        def forward(hidden: Tensor, tokens_per_expert: Tensor, *args: Any, **kwargs: Any) -> Any:
            experts.dispatch(hidden, tokens_per_expert)
            return own(mlp, hidden, tokens_per_expert, *args, **kwargs)

        mlp.forward = forward
        for index, expert in enumerate(mlp.local_experts):
            for layer in (expert.linear_fc1, expert.linear_fc2):
                taps.routed[id(layer)] = partial(experts.routed, index)

    taps.attach(module, name, attach)
