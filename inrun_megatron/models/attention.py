"""Causal attention on `torch.nn.functional.scaled_dot_product_attention`, as a core attention of megatron-core."""

from __future__ import annotations

import contextlib

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig


class SdpaCoreAttention(torch.nn.Module):
    """Takes the place of `megatron.core.transformer.dot_product_attention.DotProductAttention`, which needs CUDA.

    Runs on CPU and, on a GPU, as flash attention without TransformerEngine. Grouped queries keep their few keys and
    values (`enable_gqa`) instead of repeating them. Only the causal mask is built in.

    Parameters as megatron-core passes them to a core attention (megatron/core/transformer/attention.py,
    `CoreAttentionBuilder`).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: object | None = None,
    ) -> None:
        super().__init__()
        if attn_mask_type != AttnMaskType.causal or attention_type != "self":
            raise ValueError(
                f"SdpaCoreAttention does causal self-attention only, not {attention_type} attention with a "
                f"{attn_mask_type.name} mask"
            )
        self.sequence_parallel = config.sequence_parallel
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        /,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: object | None = None,
    ) -> torch.Tensor:
        """Attention over one microbatch.

        query [s, b, heads/tp, d], key and value [s, b, groups/tp, d] -> context [s, b, heads/tp * d].
        A mask, a bias or packed sequences raise ValueError: none of them may be silently ignored.
        """
        if attention_mask is not None or attention_bias is not None or packed_seq_params is not None:
            raise ValueError("SdpaCoreAttention takes no mask, bias or packed sequences: the mask is causal")
        # [s, b, n, d] -> [b, n, s, d]
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        # Heads are sharded over tensor-parallel ranks, so each rank needs masks of its own. Under sequence
        # parallelism the whole block already draws from that stream (TransformerBlock.forward).
        own_stream = dropout > 0.0 and not self.sequence_parallel
        with get_cuda_rng_tracker().fork() if own_stream else contextlib.nullcontext():
            context = torch.nn.functional.scaled_dot_product_attention(
                query,
                key,
                value,
                dropout_p=dropout,
                is_causal=True,
                scale=self.softmax_scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        batch, heads, sequence, width = context.shape
        return context.permute(2, 0, 1, 3).reshape(sequence, batch, heads * width)
