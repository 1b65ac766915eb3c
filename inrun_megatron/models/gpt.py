"""GPT-2-shaped and Llama-shaped models from megatron-core's layers.

Shapes: s sequence, b microbatch rows, h hidden size, v padded vocabulary; `/tp` marks a tensor-parallel shard.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from inrun_megatron.defaults import padded_vocabulary
from inrun_megatron.models import cpu, experts
from inrun_megatron.models.attention import SdpaCoreAttention, document_mask
from inrun_megatron.models.initialise import Gather, initialise
from inrun_megatron.models.norm import HeadNorm, Norm

if TYPE_CHECKING:
    from inrun_megatron.model_config import ModelConfig


def transformer_config(
    model: ModelConfig, *, tensor_parallel: int = 1, sequence_parallel: bool = False
) -> TransformerConfig:
    """megatron-core's configuration of `model`.

    The fusions are off: they need CUDA or compile functions that hide the bias a tap has to see. Parameters are fp32
    here; DeepSpeed converts them to bf16 or fp16.
    """
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.resolved_ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        kv_channels=model.resolved_kv_channels,
        normalization=model.normalization,
        qk_layernorm=model.qk_layernorm,
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=model.swiglu,
        activation_func=F.silu if model.swiglu else F.gelu,
        add_bias_linear=not model.disable_bias_linear,
        add_qkv_bias=model.add_qkv_bias,
        attention_dropout=model.attention_dropout,
        hidden_dropout=model.hidden_dropout,
        init_method_std=model.init_method_std,
        tensor_model_parallel_size=tensor_parallel,
        sequence_parallel=sequence_parallel,
        params_dtype=torch.float32,
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        **experts.expert_settings(model),
    )


def layer_spec(model: ModelConfig, number: int) -> ModuleSpec:
    """Transformer layer `number`, counted from 0: megatron-core's own layers, with norms and attention that also run on CPU."""
    experts.install()
    count = model.num_experts if model.has_experts(number) else None
    layer = get_gpt_layer_local_spec(num_experts=count, normalization=model.normalization)
    layer.submodules.input_layernorm = Norm
    layer.submodules.pre_mlp_layernorm = Norm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = SdpaCoreAttention
    if model.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = HeadNorm
    return layer


def mask_padding(logits: torch.Tensor, vocab_size: int, tp_rank: int) -> None:
    """Set the logits [s, b, v/tp] of rows past `vocab_size` to -inf, in place."""
    shard = logits.shape[-1]
    valid = vocab_size - tp_rank * shard
    if valid < shard:
        # Outside autograd: nothing upstream of the logits saved them, and their gradient in the softmax is 0.
        logits.detach()[..., max(valid, 0) :] = float("-inf")


class GPT(GPTModel):
    """megatron-core's GPTModel whose loss does not see the padding of the vocabulary.

    Megatron-LM lets the logits of padding rows take part in the softmax. Their number depends on the tensor-parallel
    size, so the loss and every gradient would too (by about log(v / vocabulary) at initialisation). Here they are set
    to -inf: they add exactly 0 to the softmax and get exactly 0 as gradient, so padding rows keep their initial 0.
    """

    vocab_size_without_padding: int

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """labels [b, s], logits [s, b, v/tp] -> losses per token [b, s], fp32."""
        mask_padding(logits, self.vocab_size_without_padding, self.tp_group.rank())
        return super().compute_language_model_loss(labels, logits)


def build_gpt(
    model: ModelConfig,
    *,
    vocab_size: int,
    seq_length: int,
    seed: int,
    sequence_parallel: bool = False,
    construction: contextlib.AbstractContextManager | None = None,
    gather: Gather | None = None,
) -> GPT:
    """The model of this rank; megatron.core's parallel_state must be initialised.

    vocab_size: without padding; `--make-vocab-size-divisible-by` x TP pads it. seed: of the parameters, which are the
    same for every TP size (models/initialise.py). construction and gather: ZeRO-3's `zero.Init` and
    `GatheredParameters`, so that no rank ever holds the whole model.
    Without CUDA this installs what megatron-core needs on CPU (models/cpu.py).
    """
    cpu.install()
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    config = transformer_config(model, tensor_parallel=tp_size, sequence_parallel=sequence_parallel)
    with construction or contextlib.nullcontext():
        gpt = GPT(
            config=config,
            transformer_layer_spec=TransformerBlockSubmodules(
                layer_specs=[layer_spec(model, number) for number in range(model.num_layers)], layer_norm=Norm
            ),
            vocab_size=padded_vocabulary(vocab_size, model.make_vocab_size_divisible_by, tp_size),
            max_sequence_length=model.max_position_embeddings or seq_length,
            share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
            position_embedding_type=model.position_embedding_type,
            rotary_base=model.rotary_base,
            rotary_percent=model.rotary_percent,
            parallel_output=True,
        )
    gpt.vocab_size_without_padding = vocab_size
    arguments: dict[str, Any] = {} if gather is None else {"gather": gather}
    initialise(gpt, config, vocab_size=vocab_size, seed=seed, tp_rank=tp_rank, tp_size=tp_size, **arguments)
    return gpt


def token_losses(module: torch.nn.Module, microbatch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Losses of a microbatch per token [b, s], fp32, not reduced and not masked.

    module: a GPT or a DeepSpeed engine around one. The attention is causal over the whole row, or within documents
    where the microbatch has `documents` [b, s] (data/samples.py).
    """
    documents = microbatch.get("documents")
    mask = None if documents is None else document_mask(documents)
    return module(microbatch["tokens"], microbatch["position_ids"], mask, labels=microbatch["labels"])
