"""Activation recomputation per chunk of transformer layers (`--recompute-granularity full`).

`megatron.core.tensor_parallel.checkpoint` saves and restores CUDA RNG states and so needs CUDA. Here the chunks go
through torch's reentrant checkpoint, and the states of Megatron's RNG tracker are restored beside torch's own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer import transformer_block
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


def _unwrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def with_tracker_states(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` for a checkpoint: its second call draws from the tracker's streams what its first call drew.

    torch's checkpoint does this for the default generators only. After the second call the streams are where they
    were before it, so that recomputation leaves no trace in them.
    """
    first: dict | None = None

    def run(*arguments: Any) -> Any:
        nonlocal first
        tracker = get_cuda_rng_tracker()
        if first is None:
            first = tracker.get_states()
            return function(*arguments)
        now = tracker.get_states()
        tracker.set_states(dict(first))
        try:
            return function(*arguments)
        finally:
            tracker.set_states(now)

    return run


def recomputed(function: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """`function(hidden)`, run again in the backward pass.

    Reentrant: ZeRO-3's module hooks then fire in the recomputed forward as in any other. Such a checkpoint has a backward
    pass only where its input has a gradient: behind frozen embeddings the parameters inside would silently get none.
    """
    if not hidden.requires_grad:
        hidden = hidden.detach().requires_grad_()
    return checkpoint(with_tracker_states(function), hidden, use_reentrant=True)


def _ask_the_block_first() -> None:
    """From megatron-core 0.18 on a block calls a function of its module, before that its method `_checkpointed_forward`.

    The function asks the block for such an attribute then; other blocks keep upstream's.
    """
    upstream = getattr(transformer_block, "checkpointed_forward", None)
    if upstream is None or hasattr(upstream, "asks_the_block"):
        return

    @functools.wraps(upstream)
    def checkpointed_forward(block: TransformerBlock, *arguments: Any, **named: Any) -> Any:
        own = getattr(block, "_checkpointed_forward", None)
        return upstream(block, *arguments, **named) if own is None else own(*arguments, **named)

    checkpointed_forward.asks_the_block = True  # type: ignore[attr-defined]
    transformer_block.checkpointed_forward = checkpointed_forward


def enable_recompute(block: TransformerBlock, num_layers: int = 1, wrap: Wrap = _unwrapped) -> None:
    """Keep only the input of every `num_layers` consecutive layers of `block`; run them again in the backward pass.

    Megatron's `--recompute-method uniform`. wrap: called once per chunk and forward pass with the function that runs
    the chunk; what it returns is called in the forward pass and again at recomputation, so a wrapper can capture a
    state at its creation and put it back in both calls.

    Chunks are recomputed whenever gradients are on, in evaluation mode too: a validation pass with gradients saves
    the same memory. Only what this instance calls for its layers is replaced
    (megatron/core/transformer/transformer_block.py); parameters and module names stay as they are.
    """
    if num_layers < 1:
        raise ValueError(f"recompute_num_layers must be at least 1, not {num_layers}")
    _ask_the_block_first()

    def checkpointed_forward(
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        context: torch.Tensor | None,
        context_mask: torch.Tensor | None,
        rotary_pos_emb: torch.Tensor | None,
        attention_bias: torch.Tensor | None,
        packed_seq_params: object | None,
        use_inner_quantization_context: bool,
        padding_mask: torch.Tensor | None = None,
        extract_layer_indices: Collection[int] = (),
        layer_offset: int = 0,
    ) -> torch.Tensor:
        if extract_layer_indices:
            raise ValueError(
                f"layers {sorted(extract_layer_indices)} are recomputed: their outputs are not kept"
            )

        def chunk(first: int) -> Callable[[torch.Tensor], torch.Tensor]:
            def run(hidden: torch.Tensor) -> torch.Tensor:
                for layer in list(block.layers)[first : first + num_layers]:
                    hidden, _ = layer(
                        hidden_states=hidden,
                        attention_mask=attention_mask,
                        context=context,
                        context_mask=context_mask,
                        rotary_pos_emb=rotary_pos_emb,
                        attention_bias=attention_bias,
                        packed_seq_params=packed_seq_params,
                        padding_mask=padding_mask,
                    )
                return hidden

            return run

        for first in range(0, len(block.layers), num_layers):
            hidden_states = recomputed(wrap(chunk(first)), hidden_states)
        return hidden_states

    # TransformerBlock.forward runs its layers through this function when its own `training` is set; dropout reads the flags of
    # the modules inside. The block's flag follows the gradient mode for the time of one forward pass.
    outer: list[bool] = []

    def before(module: torch.nn.Module, arguments: Any) -> None:
        outer.append(module.training)
        module.training = torch.is_grad_enabled()

    def after(module: torch.nn.Module, arguments: Any, output: Any) -> None:
        module.training = outer.pop()

    block.config.recompute_granularity = "full"
    block.config.recompute_method = "uniform"
    block.config.recompute_num_layers = num_layers
    block._checkpointed_forward = checkpointed_forward  # type: ignore[method-assign]
    block.register_forward_pre_hook(before)
    block.register_forward_hook(after, always_call=True)
