"""Jobs to start from: shapes of Llama 2 7B and 70B (arXiv 2307.09288), Llama 3.1 405B (arXiv 2407.21783) and Mixtral 8x7B
(arXiv 2401.04088).

Layout and batch are usual ones for the number of GPUs, not those of the papers. 405B has 126 layers, which 16 stages do not
divide: the plan is for the fullest stage (8 layers); launch/pretrain.py wants equal stages, 128 layers.
"""

from __future__ import annotations

from typing import Any

_LLAMA: dict[str, Any] = {
    "swiglu": True,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "disable_bias_linear": True,
    "untie_embeddings_and_output_weights": True,
}

PRESETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "7b": (
        _LLAMA | {"num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "ffn_hidden_size": 11008},
        {
            "vocab_size": 32000,
            "seq_length": 4096,
            "world_size": 64,
            "global_batch_size": 1024,
            "tensor_parallel": 2,
            "sequence_parallel": True,
            "zero_stage": 1,
            "target_sequences": 32,
        },
    ),
    "70b": (
        _LLAMA
        | {
            "num_layers": 80,
            "hidden_size": 8192,
            "num_attention_heads": 64,
            "ffn_hidden_size": 28672,
            "group_query_attention": True,
            "num_query_groups": 8,
        },
        {
            "vocab_size": 32000,
            "seq_length": 4096,
            "world_size": 1024,
            "global_batch_size": 1024,
            "tensor_parallel": 8,
            "pipeline_parallel": 4,
            "sequence_parallel": True,
            "zero_stage": 1,
            "target_sequences": 32,
        },
    ),
    "405b": (
        _LLAMA
        | {
            "num_layers": 126,
            "hidden_size": 16384,
            "num_attention_heads": 128,
            "ffn_hidden_size": 53248,
            "group_query_attention": True,
            "num_query_groups": 8,
        },
        {
            "vocab_size": 128256,
            "seq_length": 8192,
            "world_size": 16384,
            "global_batch_size": 2048,
            "tensor_parallel": 8,
            "pipeline_parallel": 16,
            "sequence_parallel": True,
            "zero_stage": 1,
            "target_sequences": 128,
        },
    ),
    "8x7b": (
        _LLAMA
        | {
            "num_layers": 32,
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "ffn_hidden_size": 14336,
            "group_query_attention": True,
            "num_query_groups": 8,
            "num_experts": 8,
            "moe_router_topk": 2,
        },
        {
            "vocab_size": 32000,
            "seq_length": 4096,
            "world_size": 256,
            "global_batch_size": 1024,
            "tensor_parallel": 8,
            "pipeline_parallel": 4,
            "sequence_parallel": True,
            "zero_stage": 1,
            "target_sequences": 32,
        },
    ),
}
"""Name -> (fields of ModelConfig, fields of Job)."""
