"""Checks of a model's sizes, alone and against tensor parallelism: those of a run, and of `inrun plan`."""

from __future__ import annotations

from inrun_megatron.errors import UserError
from inrun_megatron.model_config import ModelConfig
from inrun_megatron.wording import flag_of


def positive(**values: float | None) -> None:
    """UserError for the first value that is not positive; None is not given."""
    for name, value in values.items():
        if value is not None and value <= 0:
            raise UserError(f"{flag_of(name)} is {value}: it must be positive")


def not_negative(**values: float | None) -> None:
    """UserError for the first value that is negative; None is not given."""
    for name, value in values.items():
        if value is not None and value < 0:
            raise UserError(f"{flag_of(name)} is {value}: it must not be negative")


def divides(tp: int, name: str, value: int) -> None:
    """UserError where tensor-parallel ranks cannot share `value`."""
    if value % tp:
        raise UserError(f"--tensor-model-parallel-size {tp} does not divide {name} {value}")


def check_widths(model: ModelConfig, tp: int, sequence_parallel: bool) -> None:
    """The model's sizes fit together, and `tp` tensor-parallel ranks can share them."""
    positive(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        ffn_hidden_size=model.ffn_hidden_size,
        kv_channels=model.kv_channels,
        num_query_groups=model.num_query_groups,
    )
    if model.kv_channels is None and model.hidden_size % model.num_attention_heads:
        raise UserError(
            f"--num-attention-heads {model.num_attention_heads} does not divide --hidden-size {model.hidden_size}: "
            f"change one or give --kv-channels"
        )
    if model.num_attention_heads % model.query_groups:
        raise UserError(
            f"--num-query-groups {model.query_groups} does not divide --num-attention-heads "
            f"{model.num_attention_heads}"
        )
    if model.num_query_groups != 1 and not model.group_query_attention:
        raise UserError(f"--num-query-groups {model.num_query_groups} needs --group-query-attention")
    divides(tp, "--num-attention-heads", model.num_attention_heads)
    if model.group_query_attention:
        divides(tp, "--num-query-groups", model.num_query_groups)
    divides(tp, "--hidden-size", model.hidden_size)
    divides(tp, "--ffn-hidden-size", model.resolved_ffn_hidden_size)
    if model.resolved_ffn_hidden_size < 1:
        raise UserError(
            f"--swiglu with --hidden-size {model.hidden_size} gives a feed-forward width of 0: give --ffn-hidden-size"
        )
    if model.num_experts is None:
        _require_dense(model)
    else:
        _check_experts(model, tp, sequence_parallel)


def _require_dense(model: ModelConfig) -> None:
    """No setting of experts is given that would be ignored."""
    dense = ModelConfig(num_layers=1, hidden_size=1, num_attention_heads=1)
    for name, value in vars(model).items():
        if name.startswith("moe_") and value != getattr(dense, name):
            raise UserError(f"{flag_of(name)} {value} needs --num-experts")


def _check_experts(model: ModelConfig, tp: int, sequence_parallel: bool) -> None:
    positive(
        num_experts=model.num_experts,
        moe_layer_freq=model.moe_layer_freq,
        moe_ffn_hidden_size=model.moe_ffn_hidden_size,
        moe_shared_expert_intermediate_size=model.moe_shared_expert_intermediate_size,
        moe_router_topk=model.moe_router_topk,
        moe_router_topk_scaling_factor=model.moe_router_topk_scaling_factor,
    )
    not_negative(
        moe_aux_loss_coeff=model.moe_aux_loss_coeff,
        moe_z_loss_coeff=model.moe_z_loss_coeff,
        moe_router_bias_update_rate=model.moe_router_bias_update_rate,
    )
    assert model.num_experts is not None
    if model.moe_router_topk > model.num_experts:
        raise UserError(
            f"--moe-router-topk {model.moe_router_topk} is more than --num-experts {model.num_experts}"
        )
    if not model.disable_bias_linear:
        raise UserError(
            "--num-experts needs --disable-bias-linear (inrun plan: --llama): experts with biases have no taps"
        )
    if tp > 1 and not sequence_parallel:
        raise UserError(
            f"--num-experts with --tensor-model-parallel-size {tp} needs --sequence-parallel, as in Megatron-LM"
        )
    divides(tp, "--moe-ffn-hidden-size", model.resolved_moe_ffn_hidden_size)
    if model.moe_shared_expert_intermediate_size is not None:
        divides(tp, "--moe-shared-expert-intermediate-size", model.moe_shared_expert_intermediate_size)
    elif model.moe_shared_expert_gate:
        raise UserError("--moe-shared-expert-gate needs --moe-shared-expert-intermediate-size")


def check_router(model: ModelConfig) -> None:
    """How tokens are routed; no size depends on it."""
    if model.num_experts is None:
        return
    before = model.moe_router_pre_softmax or model.moe_router_score_function == "sigmoid"
    if model.moe_router_topk == 1 and not before:
        raise UserError(
            "--moe-router-topk 1 needs --moe-router-pre-softmax: the softmax over one expert is 1, and routers learn nothing"
        )
    if model.moe_router_topk_scaling_factor is not None and not before:
        raise UserError(
            f"--moe-router-topk-scaling-factor {model.moe_router_topk_scaling_factor} needs --moe-router-pre-softmax or "
            f"--moe-router-score-function sigmoid"
        )
    if model.moe_router_enable_expert_bias and model.moe_router_score_function != "sigmoid":
        raise UserError("--moe-router-enable-expert-bias needs --moe-router-score-function sigmoid")
    if model.moe_router_load_balancing_type == "none" and model.moe_aux_loss_coeff:
        raise UserError(
            f"--moe-aux-loss-coeff {model.moe_aux_loss_coeff} with --moe-router-load-balancing-type none: leave one out"
        )
