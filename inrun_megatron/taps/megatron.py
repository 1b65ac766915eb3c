"""Taps for megatron-core's tensor-parallel layers.

Column- and RowParallelLinear call ``self._forward_impl(input=, weight=, ...)`` for the product and its
fused communication: replacing that one method per instance gives the tap both buffers. Biases go through
``skip_bias_add``, so that one tap serves added and returned biases alike. Upstream:
megatron/core/tensor_parallel/layers.py; ``tests/test_canary.py`` fails if these names move.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.distributed as dist
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlock
from torch import Tensor

from ..errors import UserError
from .attach import Taps, register, require_forward
from .bias import bias as tapped_bias
from .embedding import EmbeddingCall, embedding
from .emission import Call, Sharding, Site
from .linear import LinearCall, linear

PARALLEL_LAYERS = (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding)


def _tap_product(taps: Taps, module: Any, site: Site) -> None:
    original, routed = type(module)._forward_impl, taps.routed.get(id(module))
    site = replace(site, expert=routed is not None)

    def forward_impl(input: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
        if not weight.requires_grad:
            return original(module, input=input, weight=weight, bias=bias, **options)
        assert bias is None or not bias.requires_grad, "tapped biases go through skip_bias_add"
        call = LinearCall(
            site,
            taps.current,
            weight,  # type: ignore[arg-type]
            group=module.tp_group,
            sequence_parallel=options["sequence_parallel"],
            allreduce_dgrad=options["allreduce_dgrad"],
            routed=None if routed is None else routed(),
        )
        output = linear(input, call)
        return output if bias is None else output + bias  # frozen

    module._forward_impl = forward_impl


def _tap_bias(taps: Taps, module: Any, site: Site) -> None:
    """Bias added or returned by the layer: an expanded, tapped view either way."""
    if module.bias is None or not module.bias.requires_grad:
        return
    added = not module.skip_bias_add
    original = type(module).forward

    def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        module.skip_bias_add = True  # for this call only: nothing to put back when taps are detached
        try:
            output, _ = original(module, *args, **kwargs)
        finally:
            module.skip_bias_add = not added
        expanded = tapped_bias(Call(site, taps.current, module.bias), output)
        return (output + expanded, None) if added else (output, expanded)

    module.forward = forward


def _check(taps: Taps, module: Any, name: str) -> None:
    if module.is_expert and id(module) not in taps.routed:
        raise UserError(
            f"layer {name} belongs to an expert outside a MoELayer with SequentialMLP, which has no tap: use that layer, or "
            f"train a dense model"
        )
    if module.gradient_accumulation_fusion:
        raise UserError(
            f"layer {name} fuses gradient accumulation, so its weight gradient never reaches autograd; "
            f"set gradient_accumulation_fusion=False"
        )


@register(ColumnParallelLinear)
def _column(taps: Taps, module: ColumnParallelLinear, name: str) -> None:
    _check(taps, module, name)
    if module.gather_output and module.bias is not None:
        raise UserError(
            f"layer {name} gathers its output and has a bias; set gather_output=False or bias=False"
        )
    fused = module.config.gated_linear_unit and module.config.bias_activation_fusion
    if fused and module.skip_bias_add and module.bias is not None and module.bias.requires_grad:
        raise UserError(
            f"layer {name} has a bias that a fused gated activation adds, which takes no bias by token, as the tap returns it; "
            f"set bias_activation_fusion=False or add_bias_linear=False"
        )
    place = (dist.get_rank(module.tp_group), dist.get_world_size(module.tp_group))
    _tap_product(taps, module, Site(name, "linear", Sharding.COLUMN, 1, *place))
    _tap_bias(taps, module, Site(name, "bias", Sharding.COLUMN, 1, *place))
    # An output layer tied to the embedding has no weight of its own; it is given one at each call.
    taps.cover(Sharding.COLUMN, module.weight, module.bias)


@register(RowParallelLinear)
def _row(taps: Taps, module: RowParallelLinear, name: str) -> None:
    _check(taps, module, name)
    place = (dist.get_rank(module.tp_group), dist.get_world_size(module.tp_group))
    _tap_product(taps, module, Site(name, "linear", Sharding.ROW, 1, *place))
    bias_sharding = Sharding.SEQUENCE if module.sequence_parallel else Sharding.REPLICATED
    _tap_bias(taps, module, Site(name, "bias", bias_sharding, 1, *place))
    taps.cover(Sharding.ROW, module.weight)
    taps.cover(bias_sharding, module.bias)


@register(VocabParallelEmbedding)
def _vocabulary(taps: Taps, module: VocabParallelEmbedding, name: str) -> None:
    if not module.weight.requires_grad:
        return
    require_forward(module, VocabParallelEmbedding, name)
    group = module.tp_group
    site = Site(name, "embedding", Sharding.VOCABULARY, 0, dist.get_rank(group), dist.get_world_size(group))

    def forward(input_: Tensor) -> Tensor:
        ids, foreign = input_, None
        if site.tp_size > 1:
            foreign = (ids < module.vocab_start_index) | (ids >= module.vocab_end_index)
            ids = (ids - module.vocab_start_index).masked_fill(foreign, 0)
        rows = embedding(ids, foreign, EmbeddingCall(site, taps.current, module.weight))
        if module.reduce_scatter_embeddings:  # [b, s, h] -> [s/tp, b, h]
            return reduce_scatter_to_sequence_parallel_region(rows.transpose(0, 1).contiguous(), group=group)
        return reduce_from_tensor_model_parallel_region(rows, group=group)

    module.forward = forward  # type: ignore[method-assign]
    taps.cover(Sharding.VOCABULARY, module.weight)


@register(MultiTokenPredictionBlock, refuses=True)
def _multi_token_prediction(taps: Taps, module: MultiTokenPredictionBlock, name: str) -> None:
    raise UserError(
        f"layer {name} predicts further tokens: its loss adds to gradients behind the token losses' back, in the validation "
        f"pass too, whose direction would not be that of the target's loss; set mtp_num_layers=None to score"
    )
