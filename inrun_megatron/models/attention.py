"""Causal attention, over whole rows or within documents, on `torch.nn.functional.scaled_dot_product_attention`, as a core attention of megatron-core."""

from __future__ import annotations

import contextlib

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.utils.weak import WeakTensorKeyDictionary


def document_mask(documents: torch.Tensor) -> torch.Tensor:
    """Causal attention limited to the own document (`--reset-attention-mask`).

    documents: [b, s] integers, the same for tokens of one document, neighbouring documents differ. Returns Megatron's
    attention mask, bool [b, 1, s, s]: True where query (third dimension) may not see key (`_get_ltor_masks_and_position_ids`,
    megatron/core/datasets/gpt_dataset.py).
    """
    s = documents.shape[1]
    foreign = documents[:, :, None] != documents[:, None, :]
    future = torch.ones(s, s, dtype=torch.bool, device=documents.device).triu_(1)
    return foreign.logical_or_(future)[:, None]


_ADDED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""By mask: its version, and what it was made into."""


def added(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What `scaled_dot_product_attention` adds for Megatron's mask: -inf where attention is not allowed.

    All layers of a microbatch get the same one: of booleans it would make one for each layer, and keep it for backward.
    """
    kept = not mask.is_inference()
    version, made = _ADDED.get(mask, (-1, None)) if kept else (-1, None)
    if made is None or made.dtype != dtype or version != mask._version:
        made = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, float("-inf"))
        if kept:
            _ADDED[mask] = (mask._version, made)
    return made


def for_every_head(grouped: torch.Tensor, heads: int) -> torch.Tensor:
    """Keys or values [b, groups, s, d] once for each of their queries' heads, [b, heads, s, d]."""
    batch, groups, *rest = grouped.shape
    return grouped.unsqueeze(2).expand(batch, groups, heads // groups, *rest).flatten(1, 2)


class SdpaCoreAttention(torch.nn.Module):
    """Takes the place of `megatron.core.transformer.dot_product_attention.DotProductAttention`, which needs CUDA.

    Runs on CPU and, on a GPU, as flash attention without TransformerEngine. Grouped queries keep their few keys and
    values (`enable_gqa`) instead of repeating them, but where a GPU has only kernels for that which hold s x s numbers per
    head (with a mask or in fp32, before torch 2.14). Without a mask it is causal over whole rows.

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
        attention_mask: None (causal) or bool, broadcast to [b, heads/tp, s, s], True where attention is not allowed; it
        must then forbid the future too. A bias or packed sequences raise ValueError: neither may be silently ignored.
        """
        if attention_bias is not None or packed_seq_params is not None:
            raise ValueError("SdpaCoreAttention takes no bias and no packed sequences")
        # [s, b, n, d] -> [b, n, s, d]
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        grouped = query.shape[1] != key.shape[1]
        if grouped and query.is_cuda and (attention_mask is not None or query.dtype == torch.float32):
            key, value = (for_every_head(tensor, query.shape[1]) for tensor in (key, value))
            grouped = False
        dropout = self.dropout if self.training else 0.0
        # Heads are sharded over tensor-parallel ranks, so each rank needs masks of its own. Under sequence
        # parallelism the whole block already draws from that stream (TransformerBlock.forward).
        own_stream = dropout > 0.0 and not self.sequence_parallel
        with get_cuda_rng_tracker().fork() if own_stream else contextlib.nullcontext():
            context = torch.nn.functional.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=None if attention_mask is None else added(attention_mask, query.dtype),
                dropout_p=dropout,
                is_causal=attention_mask is None,
                scale=self.softmax_scale,
                enable_gqa=grouped,
            )
        batch, heads, sequence, width = context.shape
        return context.permute(2, 0, 1, 3).reshape(sequence, batch, heads * width)
