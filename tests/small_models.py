"""Settings of the small models that tests build."""

from __future__ import annotations

from typing import Any

from inrun_megatron.model_config import ModelConfig

VOCABULARY, SEQUENCE = 257, 12
LLAMA: dict[str, Any] = {
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "disable_bias_linear": True,
    "untie_embeddings_and_output_weights": True,
}
"""What makes a GPT of Megatron's a Llama."""
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {
        **LLAMA,
        "group_query_attention": True,
        "num_query_groups": 2,
        "ffn_hidden_size": 48,
        "qk_layernorm": True,
    },
}


def model_config(shape: str, dropout: float = 0.0, **changes: Any) -> ModelConfig:
    settings: dict[str, Any] = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
    settings |= {"attention_dropout": dropout, "hidden_dropout": dropout}
    return ModelConfig(**(settings | SHAPES[shape] | changes))
