"""Flags of the model (config.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

import tyro

T = TypeVar("T")
Unset = Annotated[T | None, tyro.conf.arg(help_behavior_hint="")]
"""A flag whose default is in its help, in words: `(default: None)` would contradict it."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The GPT: GPT-2-shaped by default; the flags marked (Llama) make it Llama-shaped."""

    num_layers: int
    """Transformer layers."""
    hidden_size: int
    """Width of the residual stream."""
    num_attention_heads: int
    """Attention heads."""
    ffn_hidden_size: Unset[int] = None
    """Width of the feed-forward layer. Default: 4 x hidden size; with --swiglu 8/3 x hidden size, in steps of 64."""
    kv_channels: Unset[int] = None
    """Width of one attention head. Default: hidden size / attention heads."""
    group_query_attention: bool = False
    """(Llama) Share keys and values between the heads of a query group."""
    num_query_groups: int = 1
    """(Llama) Query groups; read with --group-query-attention only."""
    max_position_embeddings: Unset[int] = None
    """Rows of the learned position embedding. Default: the sequence length."""
    position_embedding_type: Literal["learned_absolute", "rope"] = "learned_absolute"
    """Positions: learned vectors, or (Llama) rotary."""
    rotary_base: int = 10000
    """Base period of rotary positions."""
    rotary_percent: float = 1.0
    """Share of a head's width that rotary positions turn."""
    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    """Norm: LayerNorm or (Llama) RMSNorm."""
    norm_epsilon: float = 1e-5
    """Added to the variance in the norm."""
    qk_layernorm: bool = False
    """Norm of each head's queries and keys, before rotary positions."""
    swiglu: bool = False
    """(Llama) Gated feed-forward layer with SiLU instead of GELU."""
    disable_bias_linear: bool = False
    """(Llama) No biases in linear layers."""
    add_qkv_bias: bool = False
    """Bias in the query/key/value projection although --disable-bias-linear is set."""
    untie_embeddings_and_output_weights: bool = False
    """(Llama) Output layer with weights of its own."""
    make_vocab_size_divisible_by: int = 128
    """The vocabulary is padded to a multiple of this times the tensor-parallel size. Padding changes no value."""
    init_method_std: float = 0.02
    """Standard deviation of initial weights; output projections of the layers are scaled by 1/sqrt(2 x layers)."""
    attention_dropout: float = 0.1
    """Dropout probability of attention weights."""
    hidden_dropout: float = 0.1
    """Dropout probability of the embeddings and of each layer's two outputs."""
    num_experts: Unset[int] = None
    """(Mixture of experts) Experts of a layer, in the place of its feed-forward layer; with --disable-bias-linear. Default: a dense model."""
    moe_layer_freq: int = 1
    """(Mixture of experts) Experts in the first layer and every n-th after it; the others are dense."""
    moe_ffn_hidden_size: Unset[int] = None
    """(Mixture of experts) Width of an expert. Default: that of the feed-forward layer."""
    moe_shared_expert_intermediate_size: Unset[int] = None
    """(Mixture of experts) Width of an expert that every token passes through, beside those it is routed to. Default: none."""
    moe_shared_expert_gate: bool = False
    """(Mixture of experts) A gate for that expert's output, by token."""
    moe_router_topk: int = 2
    """(Mixture of experts) Experts that a token is routed to."""
    moe_router_score_function: Literal["softmax", "sigmoid"] = "softmax"
    """(Mixture of experts) What makes scores of the router's logits."""
    moe_router_pre_softmax: bool = False
    """(Mixture of experts) Softmax over all experts, before the largest are taken, instead of over those."""
    moe_router_topk_scaling_factor: Unset[float] = None
    """(Mixture of experts) Factor of a token's scores; with --moe-router-pre-softmax or sigmoid. Default: 1."""
    moe_router_dtype: Unset[Literal["fp32", "fp64"]] = None
    """(Mixture of experts) Precision of routing. Default: that of training."""
    moe_router_enable_expert_bias: bool = False
    """(Mixture of experts) Balance experts by a bias of each one's score, with --moe-router-score-function sigmoid."""
    moe_router_bias_update_rate: float = 1e-3
    """(Mixture of experts) By how much such a bias moves after a step."""
    moe_router_load_balancing_type: Literal["aux_loss", "seq_aux_loss", "none"] = "aux_loss"
    """(Mixture of experts) Over what --moe-aux-loss-coeff evens out the experts' tokens: a microbatch, or each sample."""
    moe_aux_loss_coeff: float = 0.0
    """(Mixture of experts) Weight of the auxiliary loss that balances experts."""
    moe_z_loss_coeff: Unset[float] = None
    """(Mixture of experts) Weight of the loss on the square of the router's log-normaliser. Default: none."""

    @property
    def resolved_ffn_hidden_size(self) -> int:
        """Megatron-LM's default where the flag is not given."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        return int(4 * self.hidden_size * 2 / 3) // 64 * 64 if self.swiglu else 4 * self.hidden_size

    @property
    def resolved_kv_channels(self) -> int:
        """Width of one attention head."""
        return (
            self.kv_channels if self.kv_channels is not None else self.hidden_size // self.num_attention_heads
        )

    @property
    def resolved_moe_ffn_hidden_size(self) -> int:
        """Width of an expert."""
        return self.resolved_ffn_hidden_size if self.moe_ffn_hidden_size is None else self.moe_ffn_hidden_size

    def has_experts(self, layer: int) -> bool:
        """Is layer `layer`, counted from 0, a mixture of experts?"""
        return self.num_experts is not None and layer % self.moe_layer_freq == 0

    @property
    def query_groups(self) -> int:
        """Number of key/value heads."""
        return self.num_query_groups if self.group_query_attention else self.num_attention_heads
