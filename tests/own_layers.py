"""Layers with a forward of their own, a model of them, and the same model of plain layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.own_loop import LENGTH, VOCABULARY

WIDTH, HEAD = 8, 4


class Scaled(nn.Embedding):
    """As Gemma has it."""

    def forward(self, ids: Tensor) -> Tensor:
        return 3.0 * super().forward(ids)


class Offset(nn.Embedding):
    """Positions as OPT has them."""

    def forward(self, positions: Tensor) -> Tensor:
        return super().forward(positions + 2)


class Normed(nn.Module):
    """RMSNorm as Llama has it, or Gemma (``zero``: centred at 0)."""

    def __init__(self, width: int, zero: bool = False) -> None:
        super().__init__()
        self.zero, self.weight = zero, nn.Parameter(0.1 * torch.randn(width) + (0.0 if zero else 1.0))

    def forward(self, hidden: Tensor) -> Tensor:
        normed = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6)
        return normed * (1.0 + self.weight) if self.zero else self.weight * normed


class InDouble(nn.LayerNorm):
    """A norm in another type."""

    def forward(self, x: Tensor) -> Tensor:
        shape = self.normalized_shape
        return F.layer_norm(x.double(), shape, self.weight.double(), self.bias.double(), self.eps).to(x.dtype)


class Clamped(nn.LayerNorm):
    """A norm with an epsilon of its own, of an input that is changed."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(2.0 * x, self.normalized_shape, weight=self.weight, bias=self.bias, eps=1e-3)


class Functional(nn.Module):
    """As nanoGPT has it; ``F.layer_norm`` has an epsilon of its own where it is given none."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.rand(width)), nn.Parameter(0.1 * torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(0.1 * x, self.gamma.shape, self.gamma, self.beta)


class Defaulted(nn.RMSNorm):
    """Its own epsilon is not the one it computes with."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(0.01 * x, weight=self.weight, normalized_shape=self.normalized_shape)


class Shift(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.shift, self.scale = nn.Parameter(0.1 * torch.randn(width)), nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class Gain(nn.Module):
    """One number."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([1.5]))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x


class Halved(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


class Spelled(nn.Module):
    """Every layer in a spelling of its own; positions ``[1, s]`` and ``[s]`` are broadcast, and the head sees ``[b * s, h]``."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = Scaled(VOCABULARY, WIDTH), Offset(LENGTH + 2, WIDTH)
        self.places = nn.Embedding(LENGTH, WIDTH)
        self.norm, self.heads, self.last = Normed(WIDTH, zero=True), Normed(HEAD), Clamped(WIDTH)
        self.first = Normed(HEAD)  # heads before positions
        self.hidden, self.shift, self.gain = Halved(WIDTH, WIDTH), Shift(WIDTH), Gain()
        self.functional, self.defaulted = Functional(WIDTH), Defaulted(WIDTH, eps=0.5)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        ids = torch.arange(tokens.shape[1])
        x = self.embedding(tokens) + self.positions(ids[None]) + self.places(ids)
        x = self.norm(x)
        x = self.heads(x.unflatten(-1, (-1, HEAD))).flatten(-2)
        x = self.first(x.unflatten(-1, (-1, HEAD)).transpose(1, 2)).transpose(1, 2).flatten(-2)
        x = self.gain(x + self.shift(F.gelu(self.hidden(x))))
        x = x + self.functional(x) + self.defaulted(x)
        return self.head(self.last(x).flatten(0, 1)).unflatten(0, tokens.shape)


class Plain(nn.Module):
    """The same function of the same numbers, spelled with plain layers; vectors are tables of one row, looked up by every token."""

    def __init__(self, like: Spelled) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH + 2, WIDTH)
        self.places = nn.Embedding(LENGTH, WIDTH)
        self.norm, self.heads, self.first = (nn.RMSNorm(n, eps=1e-6) for n in (WIDTH, HEAD, HEAD))
        self.last, self.hidden = nn.LayerNorm(WIDTH, eps=1e-3), nn.Linear(WIDTH, WIDTH)
        self.head, self.defaulted = nn.Linear(WIDTH, VOCABULARY), nn.RMSNorm(WIDTH)
        for name, own in self.named_children():
            own.load_state_dict(like.get_submodule(name).state_dict())
        self.functional = nn.LayerNorm(WIDTH)
        self.functional.load_state_dict(
            {"weight": like.functional.gamma.detach(), "bias": like.functional.beta.detach()}
        )
        with torch.no_grad():
            self.norm.weight.add_(1.0)
        vectors = (like.shift.scale, like.shift.shift, like.gain.gain)
        self.scale, self.shift, self.gain = (
            nn.Embedding.from_pretrained(v[None], freeze=False) for v in vectors
        )

    def forward(self, tokens: Tensor) -> Tensor:
        ids = torch.arange(tokens.shape[1]).expand_as(tokens)
        x = 3.0 * self.embedding(tokens) + self.positions(ids + 2) + self.places(ids)
        x = self.norm(x)
        x = self.first(self.heads(x.unflatten(-1, (-1, HEAD)))).flatten(-2)
        first = torch.zeros_like(tokens)
        x = self.gain(first) * (x + F.gelu(0.5 * self.hidden(x)) * self.scale(first) + self.shift(first))
        x = x + self.functional(0.1 * x) + self.defaulted(0.01 * x)
        return self.head(self.last(2.0 * x))
