"""megatron-core's mixture-of-experts layers: their settings, and what they need without Transformer Engine."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.moe import moe_utils

from inrun_megatron.model_config import ModelConfig


def expert_settings(model: ModelConfig) -> dict[str, Any]:
    """What `TransformerConfig` has to know of them; nothing for a dense model."""
    if model.num_experts is None:
        return {}
    return {
        "num_moe_experts": model.num_experts,
        "moe_layer_freq": model.moe_layer_freq,
        "moe_ffn_hidden_size": model.resolved_moe_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": model.moe_shared_expert_intermediate_size,
        "moe_shared_expert_gate": model.moe_shared_expert_gate,
        "moe_router_topk": model.moe_router_topk,
        "moe_router_score_function": model.moe_router_score_function,
        "moe_router_pre_softmax": model.moe_router_pre_softmax,
        "moe_router_topk_scaling_factor": model.moe_router_topk_scaling_factor,
        "moe_router_dtype": model.moe_router_dtype,
        "moe_router_enable_expert_bias": model.moe_router_enable_expert_bias,
        "moe_router_bias_update_rate": model.moe_router_bias_update_rate,
        "moe_router_load_balancing_type": model.moe_router_load_balancing_type,
        "moe_aux_loss_coeff": model.moe_aux_loss_coeff,
        "moe_z_loss_coeff": model.moe_z_loss_coeff,
    }


def install() -> None:
    """Make routers usable without Transformer Engine: megatron-core 0.16 asks whether it has a function of that package, and
    defines the name only with it (moe_utils.RouterGatingLinearFunction). Safe to call again."""
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
