"""A GPT as one plain function of its full parameters: what the megatron-core model computes, on one process.

No megatron-core and no DeepSpeed here. Parameters carry the names and shapes of `GPTModel` (megatron-core 0.16,
local layer spec) at tensor-parallel size 1.

Legend: b sequences, s tokens, h hidden, f feed-forward width, n query heads, g query groups, d = h / n,
v real vocabulary, V padded vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.oracle_experts import mixture

Parameters = dict[str, Tensor]
Microbatch = dict[str, Tensor]


@dataclass(frozen=True)
class GPTShape:
    """Sizes of one model.

    `gpt2`: learned positions, LayerNorm, biases, exact GELU, tied output.
    `llama`: rotary positions, RMSNorm, SwiGLU, grouped queries, no biases, untied output.
    `ffn_hidden_size` None is Megatron's default 4h (SwiGLU included); `num_query_groups` None is one per head;
    `padded_vocab_size` None is no padding; `tied` None is the kind's own habit.
    """

    kind: Literal["gpt2", "llama"]
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    vocab_size: int
    seq_length: int
    ffn_hidden_size: int | None = None
    num_query_groups: int | None = None
    padded_vocab_size: int | None = None
    tied: bool | None = None
    norm_epsilon: float = 1e-5
    rotary_base: int = 10000
    rotary_percent: float = 1.0
    qk_layernorm: bool = False
    experts: int | None = None  # of every layer, in the place of its feed-forward layer
    topk: int = 2
    expert_ffn: int = 24
    shared_ffn: int | None = None  # of an expert for every token, with a gate
    balance: str | None = None  # auxiliary losses of training: aux_loss or seq_aux_loss, and the z loss

    @property
    def ffn(self) -> int:
        return self.ffn_hidden_size or 4 * self.hidden_size

    @property
    def groups(self) -> int:
        return self.num_query_groups or self.num_attention_heads

    @property
    def padded_vocab(self) -> int:
        return self.padded_vocab_size or self.vocab_size

    @property
    def is_tied(self) -> bool:
        return self.kind == "gpt2" if self.tied is None else self.tied

    @property
    def gated(self) -> bool:
        return self.kind == "llama"

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


def parameter_shapes(shape: GPTShape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all distinct parameters; a tied output layer has none of its own."""
    h, bias = shape.hidden_size, shape.kind == "gpt2"
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (shape.padded_vocab, h)}

    def norm(name: str, width: int = h) -> None:
        shapes[f"{name}.weight"] = (width,)
        if bias:
            shapes[f"{name}.bias"] = (width,)

    def linear(name: str, out_features: int, in_features: int) -> None:
        shapes[f"{name}.weight"] = (out_features, in_features)
        if bias:
            shapes[f"{name}.bias"] = (out_features,)

    if shape.kind == "gpt2":
        shapes["embedding.position_embeddings.weight"] = (shape.seq_length, h)
    for layer in range(shape.num_layers):
        prefix = f"decoder.layers.{layer}"
        norm(f"{prefix}.input_layernorm")
        linear(f"{prefix}.self_attention.linear_proj", h, h)
        linear(f"{prefix}.self_attention.linear_qkv", h + 2 * shape.groups * shape.head_dim, h)
        if shape.qk_layernorm:
            norm(f"{prefix}.self_attention.q_layernorm", shape.head_dim)
            norm(f"{prefix}.self_attention.k_layernorm", shape.head_dim)
        norm(f"{prefix}.pre_mlp_layernorm")
        if shape.experts is not None:
            linear(f"{prefix}.mlp.router", shape.experts, h)
        if shape.shared_ffn is not None:
            shapes[f"{prefix}.mlp.shared_experts.gate_weight"] = (1, h)
        for name, width in _feed_forward(shape).items():
            linear(f"{prefix}.{name}.linear_fc1", (2 if shape.gated else 1) * width, h)
            linear(f"{prefix}.{name}.linear_fc2", h, width)
    norm("decoder.final_layernorm")
    if not shape.is_tied:
        shapes["output_layer.weight"] = (shape.padded_vocab, h)
    return shapes


def _feed_forward(shape: GPTShape) -> dict[str, int]:
    """A layer's feed-forward layers and their widths."""
    if shape.experts is None:
        return {"mlp": shape.ffn}
    widths = {f"mlp.experts.local_experts.{e}": shape.expert_ffn for e in range(shape.experts)}
    return widths if shape.shared_ffn is None else {**widths, "mlp.shared_experts": shape.shared_ffn}


def random_parameters(
    shape: GPTShape, seed: int = 0, scale: float = 0.1, dtype: torch.dtype = torch.float64
) -> Parameters:
    """Full parameters, normal with deviation `scale`, around one for norm weights and zero for the rest.

    Norm weights and biases are perturbed too: at their usual initial values an error in them would not show.
    Padded vocabulary rows are filled as well, so that a softmax that includes them gives other losses.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = {}
    for name, size in parameter_shapes(shape).items():
        value = torch.randn(size, generator=generator, dtype=torch.float64) * scale
        parameters[name] = (value + 1.0 if name.endswith("layernorm.weight") else value).to(dtype)
    return parameters


def with_padded_vocab(parameters: Parameters, vocab_size: int, padded_vocab_size: int) -> Parameters:
    """The same model with another padding: real rows are kept, padded rows are zero."""

    def pad(value: Tensor) -> Tensor:
        padding = value.new_zeros(padded_vocab_size - vocab_size, value.shape[1])
        return torch.cat((value[:vocab_size], padding))

    vocabulary = ("embedding.word_embeddings.weight", "output_layer.weight")
    return {name: pad(value) if name in vocabulary else value for name, value in parameters.items()}


class OracleGPT:
    """Forward pass of either shape in the precision of its parameters; without dropout.

    own: bool [b, s]: only these positions' uses of the parameters have a gradient. Elsewhere the parameters are constants,
    so that the gradient is the part of the whole one that goes through these positions' own buffers.
    frozen: parameters that are the model's own, beside those that its methods are given.
    """

    def __init__(self, shape: GPTShape, own: Tensor | None = None, frozen: Parameters | None = None) -> None:
        self.shape = shape
        self.own = own
        self.frozen = frozen or {}
        self.routed: list[Tensor] = []  # logits [b, s, E] of the last forward's routers

    def _use(self, function: Callable[..., Tensor], *parameters: Tensor | None) -> Tensor:
        """`function` of parameters, a gradient only at `own` positions; its result is [b, s, ...]."""
        if self.own is None:
            return function(*parameters)
        constants = function(*(None if p is None else p.detach() for p in parameters))
        own = self.own.view(*self.own.shape, *[1] * (constants.dim() - 2))
        return torch.where(own, function(*parameters), constants)

    def token_losses(self, parameters: Parameters, batch: Microbatch) -> Tensor:
        """Cross entropy of every label, [b, s]. The softmax runs over the `vocab_size` real entries."""
        logits = self.logits(parameters, batch["tokens"], batch["position_ids"])  # [b, s, v]
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none").view_as(
            batch["labels"]
        )

    def logits(self, parameters: Parameters, tokens: Tensor, position_ids: Tensor) -> Tensor:
        """Logits of the real vocabulary, [b, s, v], from tokens and positions [b, s]."""
        shape, parameters = self.shape, {**self.frozen, **parameters}
        self.routed = []
        words = parameters["embedding.word_embeddings.weight"]
        hidden = self._use(lambda w: F.embedding(tokens, w), words)  # [b, s, h]
        if shape.kind == "gpt2":
            places = parameters["embedding.position_embeddings.weight"]
            hidden = hidden + self._use(lambda w: F.embedding(position_ids, w), places)
        for layer in range(shape.num_layers):
            prefix = f"decoder.layers.{layer}"
            normed = self._norm(parameters, f"{prefix}.input_layernorm", hidden)
            hidden = hidden + self._attention(parameters, f"{prefix}.self_attention", normed)
            normed = self._norm(parameters, f"{prefix}.pre_mlp_layernorm", hidden)
            feed_forward = self._mlp if shape.experts is None else self._experts
            hidden = hidden + feed_forward(parameters, f"{prefix}.mlp", normed)
        hidden = self._norm(parameters, "decoder.final_layernorm", hidden)
        output = "embedding.word_embeddings.weight" if shape.is_tied else "output_layer.weight"
        return self._use(lambda w: hidden @ w[: shape.vocab_size].T, parameters[output])

    def _norm(self, parameters: Parameters, name: str, hidden: Tensor) -> Tensor:
        weight, eps = parameters[f"{name}.weight"], self.shape.norm_epsilon
        size = tuple(weight.shape)
        if self.shape.kind == "llama":
            return self._use(lambda w: F.rms_norm(hidden, size, w, eps), weight)
        return self._use(
            lambda w, c: F.layer_norm(hidden, size, w, c, eps), weight, parameters[f"{name}.bias"]
        )

    def _linear(self, parameters: Parameters, name: str, hidden: Tensor) -> Tensor:
        weight, bias = parameters[f"{name}.weight"], parameters.get(f"{name}.bias")
        return self._use(lambda w, c: F.linear(hidden, w, c), weight, bias)

    def chosen(self, logits: Tensor) -> Tensor:
        """The experts of every token, [b, s, k], in the layer whose router gave logits [b, s, E]."""
        return logits.topk(self.shape.topk, dim=-1).indices

    def _experts(self, parameters: Parameters, prefix: str, hidden: Tensor) -> Tensor:
        logits = self._linear(parameters, f"{prefix}.router", hidden)
        self.routed.append(logits)

        def expert(e: int, weight: Tensor) -> Tensor:
            return self._mlp(parameters, f"{prefix}.experts.local_experts.{e}", hidden, weight)

        output = mixture(logits, self.chosen(logits), expert)
        if self.shape.shared_ffn is not None:
            shared = self._mlp(parameters, f"{prefix}.shared_experts", hidden)
            gate = parameters[f"{prefix}.shared_experts.gate_weight"]
            output = output + shared * self._use(lambda w: F.linear(hidden, w), gate).sigmoid()
        return output

    def _mlp(
        self, parameters: Parameters, prefix: str, hidden: Tensor, weight: Tensor | None = None
    ) -> Tensor:
        """weight [b, s, 1]: what a token counts, as Megatron applies it, between the two linear layers."""
        inner = self._linear(parameters, f"{prefix}.linear_fc1", hidden)  # [b, s, f or 2f]
        if self.shape.gated:
            gate, up = inner.chunk(2, dim=-1)
            inner = F.silu(gate) * up
        else:
            inner = F.gelu(inner)
        return self._linear(parameters, f"{prefix}.linear_fc2", inner if weight is None else inner * weight)

    def _attention(self, parameters: Parameters, prefix: str, hidden: Tensor) -> Tensor:
        """Causal attention; the rows of linear_qkv are, group by group, its n/g queries, its key, its value."""
        shape, (b, s, _) = self.shape, hidden.shape
        g, d, per_group = shape.groups, shape.head_dim, shape.num_attention_heads // shape.groups
        mixed = self._linear(parameters, f"{prefix}.linear_qkv", hidden).view(b, s, g, per_group + 2, d)
        query, key, value = mixed.split((per_group, 1, 1), dim=3)  # [b, s, g, n/g or 1, d]
        if shape.qk_layernorm:
            query = self._norm(parameters, f"{prefix}.q_layernorm", query)
            key = self._norm(parameters, f"{prefix}.k_layernorm", key)
        if shape.kind == "llama":
            query, key = self._rotate(query), self._rotate(key)
        query, key, value = (tensor.permute(0, 2, 3, 1, 4) for tensor in (query, key, value))
        scores = query @ key.transpose(-1, -2) / math.sqrt(d)  # [b, g, n/g, s, s]
        future = torch.ones(s, s, dtype=torch.bool).triu(1)
        context = scores.masked_fill(future, -math.inf).softmax(-1) @ value  # [b, g, n/g, s, d]
        context = context.permute(0, 3, 1, 2, 4).reshape(b, s, shape.hidden_size)
        return self._linear(parameters, f"{prefix}.linear_proj", context)

    def _rotate(self, heads: Tensor) -> Tensor:
        """Rotary positions on [b, s, g, n/g, d].

        Angles, sines and cosines are taken in fp32 whatever the precision, as megatron-core does
        (models/common/embeddings/rotary_pos_embedding.py and rope_utils.py); positions are 0..s-1.
        """
        shape, s = self.shape, heads.shape[1]
        rotated = int(shape.head_dim * shape.rotary_percent)
        exponents = torch.arange(0, rotated, 2, dtype=torch.float32) / rotated
        angles = torch.outer(torch.arange(s, dtype=torch.float32), 1.0 / shape.rotary_base**exponents)
        angles = torch.cat((angles, angles), dim=-1)[:, None, None, :]  # [s, 1, 1, rotated]
        cosine, sine = angles.cos().to(heads.dtype), angles.sin().to(heads.dtype)
        turned, rest = heads[..., :rotated], heads[..., rotated:]
        first, second = turned.chunk(2, dim=-1)
        turned = turned * cosine + torch.cat((-second, first), dim=-1) * sine
        return torch.cat((turned, rest), dim=-1)
