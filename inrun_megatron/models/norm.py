"""LayerNorm and RMSNorm for megatron-core's layer spec that work under sequence parallelism."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class Norm:
    """Factory in the place of `WrappedTorchNorm` (megatron/core/transformer/torch_norm.py), which refuses sequence
    parallelism although the computation does not depend on it.

    Returns a plain `torch.nn.LayerNorm` or `torch.nn.RMSNorm` over the last dimension. Under sequence parallelism a
    rank sees only its shard of the sequence, so its gradient is a part of the whole: the parameters are marked
    `sequence_parallel`, Megatron's own mark for "sum this gradient over the tensor-parallel group". DeepSpeed does
    not read the mark; engines/gradients.py does.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> torch.nn.Module:  # type: ignore[misc]
        if config.normalization == "LayerNorm":
            norm: torch.nn.Module = torch.nn.LayerNorm(hidden_size, eps=eps)
        elif config.normalization == "RMSNorm":
            norm = torch.nn.RMSNorm(hidden_size, eps=eps)
        else:
            raise ValueError(f"normalization {config.normalization!r} is not known: use LayerNorm or RMSNorm")
        if config.layernorm_zero_centered_gamma:
            raise ValueError("layernorm_zero_centered_gamma is not supported by torch's norms")
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


class HeadNorm(Norm):
    """The same for queries or keys by head, of which a tensor-parallel rank has its own.

    Its gradient is a part of the whole at any tensor-parallel size: parameters are marked `own_heads`. Megatron-LM finds
    them by their names (megatron/core/distributed/finalize_model_grads.py).
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> torch.nn.Module:  # type: ignore[misc]
        norm = Norm(config, hidden_size, eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = False  # type: ignore[attr-defined]
            parameter.own_heads = True  # type: ignore[attr-defined]
        return norm  # type: ignore[return-value]
