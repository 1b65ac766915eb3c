"""The tap for Hugging Face's experts: modules whose weights are stacked, ``gate_up_proj`` and ``down_proj``, of any family.

Their classes are many and their interface is one: ``forward(hidden [T, h], top_k_index [T, k], top_k_weights [T, k])``, and what
transformers' decorator writes on an instance says how weights lie. The tap computes as their grouped product does, tokens sorted
by expert, with a product for each. Upstream: transformers/integrations/moe.py, since 5; ``tests/test_huggingface.py`` fails if it moves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from .attach import Taps
from .embedding import EmbeddingCall, embedding
from .emission import Pass, Site
from .plain import place, tensor_parallel_place
from .routing import Routed, Routing
from .stacked import StackedCall, stacked

MARKS = ("num_experts", "has_gate", "has_bias", "is_transposed", "_apply_gate")
"""What transformers' decorator, and every such class, has."""


def is_experts(module: nn.Module) -> bool:
    """Does transformers' decorator know the module?"""
    return all(hasattr(module, mark) for mark in MARKS)


def tap_experts(taps: Taps, module: Any, name: str) -> None:
    """Tap a module that ``is_experts``.

    Raises:
        UserError: it holds what this interface does not say, or a part of it is frozen.
    """
    up = "gate_up_proj" if module.has_gate else "up_proj"
    known = {up, "down_proj", *((f"{up}_bias", "down_proj_bias") if module.has_bias else ())}
    own = dict(module.named_parameters(recurse=False))
    trained = {n for n, p in own.items() if p.requires_grad}
    if not trained:
        return
    if own.keys() != known or trained != known:
        raise UserError(
            f"layer {name} ({type(module).__name__}) trains {', '.join(sorted(trained))} of {', '.join(sorted(own))}: its tap "
            f"knows {', '.join(sorted(known))}, all of them trained; freeze the others with the rest (requires_grad=False)"
        )
    for setting in ("_is_expert_parallel", "has_post_expert_norm"):
        if getattr(module, setting, False):
            raise UserError(f"layer {name} has {setting}, which has no tap yet")
    _StackedExperts(taps, module, name, up, own)


class _StackedExperts:
    """The forward that takes the module's place."""

    def __init__(self, taps: Taps, module: Any, name: str, up: str, own: dict[str, nn.Parameter]) -> None:
        self._taps, self._module, self._own, self._name = taps, module, own, name
        self._up, self._first = up, next(iter(own.values()))
        self._compared = False
        module.forward = self.forward
        taps.cover(place(self._first), *own.values())

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As the module's own."""
        run, module = self._taps.current, self._module
        if run is None:
            own = type(module).forward(module, hidden_states, top_k_index, top_k_weights)
            return own  # type: ignore[no-any-return]
        chosen = top_k_index.reshape(-1)
        order = chosen.argsort(stable=True)
        routing = self._routing(run, chosen, order, top_k_index.shape[-1])
        inner = self._linear(self._up, hidden_states[routing.tokens], routing)
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        output = self._linear("down_proj", inner, routing)
        output = output * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        by_token = output[back].view(*top_k_index.shape, -1)
        total = by_token.sum(1).to(hidden_states.dtype)
        if not self._compared:
            self._compare(total.detach(), hidden_states, top_k_index, top_k_weights)
        return total

    def _compare(self, found: Tensor, *given: Tensor) -> None:
        """The first call's output with that of the module's own forward, which may be anything.

        Raises:
            UserError: they differ.
        """
        with torch.no_grad():
            own = type(self._module).forward(self._module, *given)
        # Rounding of k outputs that are added up in another order; a unit at most was seen in bf16.
        near = 8 * torch.finfo(found.dtype).eps * float(own.abs().max()) if own.numel() else 0.0
        if own.shape != found.shape or not torch.allclose(own, found, rtol=0.0, atol=near, equal_nan=True):
            raise UserError(
                f"layer {self._name} ({type(self._module).__name__}) computes something else than stacked experts do, and its "
                f"tap would undo that: register a tap for the type, or freeze its parameters (requires_grad=False)"
            )
        self._compared = True

    def _routing(self, run: Pass, chosen: Tensor, order: Tensor, experts_of_token: int) -> Routing:
        """Of this call; the host waits for the number of every expert's tokens."""
        total = len(chosen) // experts_of_token
        if run.rows > 1:
            run.require_apart(f"layer {self._name} sees rows and positions joined")
            if run.positions is None or total != run.rows * run.positions:
                known = "" if run.positions is None else f" of {run.positions} positions"
                raise UserError(
                    f"layer {self._name} sees {total} tokens joined, of a microbatch of {run.rows} rows{known}: values need "
                    f"experts that are given every token, and samples() the loss mask [b, s] as its tokens"
                )
        sizes = torch.bincount(chosen, minlength=self._module.num_experts).tolist()
        if len(sizes) > self._module.num_experts:
            raise UserError(
                f"layer {self._name} is told of expert {len(sizes) - 1} and has {self._module.num_experts}: every token must "
                f"go to experts that there are"
            )
        routing = Routing(order // experts_of_token, tuple(sizes), total, not self._taps.sequence_first)
        for route in run.routes if torch.is_grad_enabled() else ():
            route(routing)
        return routing

    def _linear(self, name: str, tokens: Tensor, routing: Routing) -> Tensor:
        weight, run = self._own[name], self._taps.current
        transposed = bool(self._module.is_transposed)
        output = stacked(
            tokens, StackedCall(self._site(name, "experts", transposed), run, weight, routing=routing)
        )
        if not self._module.has_bias:
            return output
        bias, routed = self._own[f"{name}_bias"], Routed(routing)
        site = self._site(f"{name}_bias", "embedding", False)
        return output + embedding(routing.owners, None, EmbeddingCall(site, run, bias, routed=routed))

    def _site(self, parameter: str, kind: str, transposed: bool) -> Site:
        own = f"{self._name}.{parameter}"
        places = tensor_parallel_place()
        return Site(own, kind, place(self._first), 0, *places, transposed=transposed, expert=True)
