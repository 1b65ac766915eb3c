"""Taps for plain torch layers and subclasses of them, nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from .attach import Taps, computes_weight, register
from .bias import bias as tapped_bias
from .embedding import EmbeddingCall, embedding
from .emission import Call, Pass, Sharding, Site
from .linear import LinearCall, linear
from .norm import NormCall, norm
from .own_forward import around


def place(parameter: nn.Parameter) -> Sharding:
    """A parameter of a plain layer: Megatron marks those that see sequence shards, models/norm.py those that see heads."""
    if getattr(parameter, "own_heads", False):
        return Sharding.HEADS
    return Sharding.SEQUENCE if getattr(parameter, "sequence_parallel", False) else Sharding.REPLICATED


def tensor_parallel_place() -> tuple[int, int]:
    """(rank, size) in Megatron's tensor-parallel group, (0, 1) without one."""
    try:
        from megatron.core import parallel_state
    except ImportError:
        return 0, 1
    if not parallel_state.model_parallel_is_initialized():
        return 0, 1
    return (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )


def forward_of(
    module: Any,
    kind: type[nn.Module],
    tapped: Callable[..., Tensor],
    use: Callable[..., Tensor] | None = None,
) -> Callable[..., Any]:
    """The forward of ``module``, a ``kind`` or a subclass: ``tapped``, or its own in which ``kind``'s function is ``use``."""
    if type(module).forward is kind.forward:
        return tapped
    return around(module, kind, module.weight, getattr(module, "bias", None), use or tapped)


@register(nn.Linear)
def _linear(taps: Taps, module: Any, name: str) -> None:
    if computes_weight(module):
        return
    tapped = tap_linear(taps, module, name)
    if tapped is not None:
        module.forward = forward_of(module, nn.Linear, tapped)


def tap_linear(
    taps: Taps, module: Any, name: str, *, transposed: bool = False
) -> Callable[..., Tensor] | None:
    """The tapped forward ``(input, dtype of the product)`` of a module with a ``weight [out, in]`` (``transposed``: ``[in, out]``) and perhaps a ``bias``, None if frozen."""
    if not module.weight.requires_grad:
        return None
    rank, size = tensor_parallel_place()
    site = Site(name, "linear", place(module.weight), 1 if taps.sequence_first else 0, rank, size, transposed)
    bias_site = replace(site, kind="bias", transposed=False)
    taps.cover(site.sharding, module.weight, bias_of(module))

    def tapped(input: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        run, bias = taps.current, bias_of(module)
        output = linear(input, LinearCall(site, run, module._parameters["weight"], dtype=dtype))
        if bias is None:
            return output
        if not bias.requires_grad:
            return output + bias
        return output + tapped_bias(Call(bias_site, run, bias), output)

    return tapped


def bias_of(module: nn.Module) -> nn.Parameter | None:
    """A layer's bias, if it is a parameter: others have a flag of that name."""
    return module._parameters.get("bias")


def _every_row(ids: Tensor, name: str, run: Pass | None) -> Tensor:
    """Ids ``[1, s]`` or ``[s]`` that the model broadcasts later (positions), for each of the pass's rows: ``[b, s]``."""
    if run is None or run.rows == 1 or not 1 <= ids.dim() <= 2:
        return ids
    if not (ids.shape[0] == 1 if ids.dim() == 2 else len(ids) == run.positions != run.rows):
        return ids
    run.require_apart(f"embedding {name} has ids of shape {list(ids.shape)} for all rows")
    run.expanded.append(name)
    return ids.expand(run.rows, *ids.shape[-1:])


def _require_rows_alone(name: str, max_norm: float | None, scale_grad_by_freq: bool, sparse: bool) -> None:
    if max_norm is not None or sparse or scale_grad_by_freq:
        raise UserError(
            f"embedding {name} uses max_norm, sparse or scale_grad_by_freq, which make gradients depend on "
            f"other samples; switch them off"
        )


@register(nn.Embedding)
def _embedding(taps: Taps, module: Any, name: str) -> None:
    if computes_weight(module) or not module.weight.requires_grad:
        return
    rank, size = tensor_parallel_place()
    # Ids are [b, s] in Megatron too, and its position embedding is summed in full before the scatter:
    # replicated even under sequence parallelism (models/common/embeddings/language_model_embedding.py).
    site = Site(name, "embedding", Sharding.REPLICATED, 0, rank, size)

    def use(
        input: Tensor, padding_idx: int | None, max_norm: float | None, scale_grad_by_freq: bool, sparse: bool
    ) -> Tensor:
        _require_rows_alone(name, max_norm, scale_grad_by_freq, sparse)
        if padding_idx is not None and padding_idx < 0:
            padding_idx += len(module.weight)
        call = EmbeddingCall(site, taps.current, module.weight, padding_idx=padding_idx)
        return embedding(_every_row(input, name, taps.current), None, call)

    def tapped(input: Tensor) -> Tensor:
        return use(input, module.padding_idx, module.max_norm, module.scale_grad_by_freq, module.sparse)

    _require_rows_alone(name, module.max_norm, module.scale_grad_by_freq, module.sparse)

    module.forward = forward_of(module, nn.Embedding, tapped, use)
    taps.cover(site.sharding, module.weight)


def _norm(taps: Taps, module: Any, name: str, kind: type[nn.Module]) -> None:
    if computes_weight(module):
        return
    weight: nn.Parameter | None = module.weight
    shift: nn.Parameter | None = getattr(module, "bias", None)
    if weight is None or not weight.requires_grad:
        return
    over = len(module.normalized_shape)  # ZeRO-3 leaves the weight itself without its shape
    if over != 1:
        raise UserError(f"norm {name} is over {over} dimensions; only the last one is supported")
    rank, size = tensor_parallel_place()
    site = Site(name, "norm", place(weight), 1 if taps.sequence_first else 0, rank, size)
    require_all_heads(taps, module, site)

    use = tapped_norm(taps, site, weight, shift, rms=kind is nn.RMSNorm)
    # torch's own names for the argument, which may be given by name.
    tapped = (lambda x: use(x, module.eps)) if kind is nn.RMSNorm else (lambda input: use(input, module.eps))
    module.forward = forward_of(module, kind, tapped, use)
    taps.cover(site.sharding, weight, shift)


def tapped_norm(
    taps: Taps, site: Site, weight: nn.Parameter, shift: nn.Parameter | None, *, rms: bool
) -> Callable[[Tensor, float | None], Tensor]:
    """``(input, eps) -> output`` of a norm with these parameters."""

    def tapped(input: Tensor, eps: float | None) -> Tensor:
        return norm(input, NormCall(site, taps.current, weight, shift, eps=eps, rms=rms))

    return tapped


def require_all_heads(taps: Taps, module: Any, site: Site) -> None:
    """Not so of norms of queries or keys by head in megatron-core's attention; multi-latent attention has them before the heads."""
    if not site.replicated:
        return
    attention: Any = taps.model.get_submodule(site.name.rpartition(".")[0])
    norms = [getattr(attention, own, None) for own in ("q_layernorm", "k_layernorm")]
    if any(own is module for own in norms) and not hasattr(attention, "linear_kv_up_proj"):
        raise UserError(
            f"norm {site.name} sees the heads of its tensor-parallel rank only, and DeepSpeed does not sum its gradient over "
            f"ranks: set own_heads = True on its parameters before InRunShapley is made, and call "
            f"engines.gradients.sum_partial_gradients"
        )


@register(nn.LayerNorm)
def _layer_norm(taps: Taps, module: Any, name: str) -> None:
    _norm(taps, module, name, nn.LayerNorm)


@register(nn.RMSNorm)
def _rms_norm(taps: Taps, module: Any, name: str) -> None:
    _norm(taps, module, name, nn.RMSNorm)


@register(nn.modules.batchnorm._BatchNorm, refuses=True)
def _batch_norm(taps: Taps, module: Any, name: str) -> None:
    if module.training:
        raise UserError(
            f"layer {name} is a {type(module).__name__}, through which rows change each other's losses, so that no row has a "
            f"gradient of its own; use a norm over features, or freeze its statistics with eval()"
        )
    own = module.forward

    def forward(input: Tensor) -> Tensor:
        if module.training:
            raise UserError(
                f"layer {name} is a {type(module).__name__} and has been put into training mode since taps were attached, where "
                f"rows change each other's losses: call its eval() again after train() of the whole model"
            )
        return own(input)  # type: ignore[no-any-return]

    module.forward = forward
