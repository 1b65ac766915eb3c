"""A small byte GPT of plain torch layers: pre-norm, learned positions, exact GELU, untied output, no dropout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 257  # bytes and the end of a document


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; `sequence` is the number of positions."""

    layers: int = 2
    hidden: int = 64
    heads: int = 4
    sequence: int = 64


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        h = shape.hidden
        self.heads = shape.heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(h), nn.LayerNorm(h)
        self.qkv, self.projection = nn.Linear(h, 3 * h), nn.Linear(h, h)
        self.up, self.down = nn.Linear(h, 4 * h), nn.Linear(4 * h, h)

    def forward(self, x: Tensor) -> Tensor:  # [b, s, h]
        b, s, h = x.shape
        mixed = self.qkv(self.attention_norm(x)).view(b, s, 3, self.heads, h // self.heads)
        query, key, value = mixed.permute(2, 0, 3, 1, 4)  # [b, heads, s, h/heads] each
        context = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.projection(context.transpose(1, 2).reshape(b, s, h))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class SmallGPT(nn.Module):
    """Weights are normal with deviation 0.02 from `seed`, biases zero."""

    def __init__(self, shape: Shape, seed: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, shape.hidden)
        self.positions = nn.Embedding(shape.sequence, shape.hidden)
        self.blocks = nn.ModuleList([Block(shape) for _ in range(shape.layers)])
        self.norm = nn.LayerNorm(shape.hidden)
        self.output = nn.Linear(shape.hidden, VOCABULARY, bias=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim == 2:
                    parameter.normal_(0.0, 0.02, generator=generator)
                elif name.endswith("bias"):
                    parameter.zero_()

    def forward(self, tokens: Tensor) -> Tensor:  # [b, s] -> [b, s, vocabulary]
        places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        x = self.tokens(tokens) + self.positions(places)
        for block in self.blocks:
            x = block(x)
        return self.output(self.norm(x))


def token_losses(module: nn.Module, rows: Tensor) -> Tensor:
    """Cross entropy of every next byte, `[b, s]`, of rows `[b, s + 1]`."""
    labels = rows[:, 1:]
    logits = module(rows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
