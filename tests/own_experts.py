"""Experts as transformers stacks them, without transformers, and the same function of the same numbers spelled with plain layers."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.own_loop import VOCABULARY

WIDTH, INNER, EXPERTS, TOPK = 12, 10, 4, 2


class Stacked(nn.Module):
    """The interface of transformers/integrations/moe.py."""

    _is_expert_parallel = has_post_expert_norm = False

    def __init__(self, *, bias: bool, transposed: bool, gate: bool) -> None:
        super().__init__()
        self.num_experts, self.has_gate, self.has_bias, self.is_transposed = EXPERTS, gate, bias, transposed
        self.up = "gate_up_proj" if gate else "up_proj"
        wide = 2 * INNER if gate else INNER
        for name, out, width in ((self.up, wide, WIDTH), ("down_proj", WIDTH, INNER)):
            shape = (EXPERTS, width, out) if transposed else (EXPERTS, out, width)
            setattr(self, name, nn.Parameter(0.5 * torch.randn(shape)))
            if bias:
                setattr(self, f"{name}_bias", nn.Parameter(0.5 * torch.randn(EXPERTS, out)))

    def _apply_gate(self, up: Tensor) -> Tensor:
        gate, value = up.chunk(2, dim=-1)
        return F.silu(gate) * value

    def act_fn(self, up: Tensor) -> Tensor:
        return F.gelu(up)

    def expert(self, number: int, name: str) -> tuple[Tensor, Tensor | None]:
        """Its weight ``[out, in]``, and its bias."""
        weight = getattr(self, name)[number]
        return weight.t() if self.is_transposed else weight, (
            getattr(self, f"{name}_bias")[number] if self.has_bias else None
        )

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        output = torch.zeros_like(hidden)
        for number in range(EXPERTS):
            token, place = (chosen == number).nonzero(as_tuple=True)
            inner = F.linear(hidden[token], *self.expert(number, self.up))
            inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
            own = F.linear(inner, *self.expert(number, "down_proj"))
            output = output.index_add(0, token, own * weights[token, place, None])
        return output


class Router(nn.Module):
    """In fp32 whatever it trains in, of joined rows and positions."""

    bias: nn.Parameter | Literal[False]  # a flag, as others have it

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, WIDTH))
        self.bias = nn.Parameter(torch.randn(EXPERTS)) if bias else False

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        joined = hidden.reshape(-1, WIDTH)
        logits = F.linear(
            joined.float(), self.weight.float(), self.bias.float() if self.bias is not False else None
        )
        weights, chosen = logits.topk(TOPK, dim=-1)
        return weights.softmax(-1).to(hidden.dtype), chosen


class Mixture(nn.Module):
    """An embedding, experts beside it, an output layer."""

    def __init__(self, *, bias: bool = False, transposed: bool = False, gate: bool = True) -> None:
        super().__init__()
        self.embedding, self.router = nn.Embedding(VOCABULARY, WIDTH), Router(bias=bias)
        self.experts = Stacked(bias=bias, transposed=transposed, gate=gate)
        self.output = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        weights, chosen = self.router(hidden)
        mixed = self.experts(hidden.flatten(0, 1), chosen, weights)
        return self.output(hidden + mixed.view_as(hidden))


class Dense(nn.Module):
    """Of plain layers: every expert sees every token, and those that are not chosen count nothing."""

    def __init__(self, like: Mixture) -> None:
        super().__init__()
        own, bias = like.experts, like.experts.has_bias
        self.embedding, self.output = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.router = nn.Linear(WIDTH, EXPERTS, bias=bias)
        self.gated = own.has_gate
        wide = 2 * INNER if own.has_gate else INNER
        self.up = nn.ModuleList(nn.Linear(WIDTH, wide, bias=bias) for _ in range(EXPERTS))
        self.down = nn.ModuleList(nn.Linear(INNER, WIDTH, bias=bias) for _ in range(EXPERTS))
        for name in ("embedding", "output", "router"):
            self.get_submodule(name).load_state_dict(like.get_submodule(name).state_dict())
        with torch.no_grad():
            for layers, name in ((self.up, own.up), (self.down, "down_proj")):
                for number, layer in enumerate(layers):
                    self._copy(layer, *own.expert(number, name))

    @staticmethod
    def _copy(layer: Any, weight: Tensor, bias: Tensor | None) -> None:
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        largest, chosen = self.router(hidden).topk(TOPK, dim=-1)
        weights = torch.zeros(*tokens.shape, EXPERTS).scatter(-1, chosen, largest.softmax(-1))
        mixed = torch.zeros_like(hidden)
        for number, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            inner = up(hidden)
            if self.gated:
                gate, value = inner.chunk(2, dim=-1)
                inner = F.silu(gate) * value
            else:
                inner = F.gelu(inner)
            mixed = mixed + down(inner) * weights[..., number : number + 1]
        return self.output(hidden + mixed)
