"""The layers that a pipeline's stages are made of, and the loss of its last stage (models/pipeline.py).

Each names in `gpt_prefix` where its parameters are in GPTModel.

Shapes: s sequence, b microbatch rows, h hidden size, v padded vocabulary; `/tp` marks a tensor-parallel shard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from inrun_megatron.losses import masked_mean
from inrun_megatron.models.gpt import layer_spec, mask_padding
from inrun_megatron.models.norm import Norm
from inrun_megatron.models.recompute import Wrap, recomputed

if TYPE_CHECKING:
    from inrun_megatron.model_config import ModelConfig

# tokens, position ids and, where attention is cut at documents, documents: [b, s] each
Inputs = tuple[Tensor, ...]
Labels = tuple[Tensor, Tensor]


class WordEmbeddings(torch.nn.Module):
    """Rows of the vocabulary, and where they are tied the output layer that shares them."""

    gpt_prefix = "embedding."

    def __init__(
        self, config: TransformerConfig, vocabulary: int, learned_positions: bool, tied: bool
    ) -> None:
        super().__init__()
        self.word_embeddings = VocabParallelEmbedding(
            vocabulary,
            config.hidden_size,
            init_method=config.embedding_init_method,
            # Learned positions are added to whole rows first (as in LanguageModelEmbedding).
            reduce_scatter_embeddings=config.sequence_parallel and not learned_positions,
            config=config,
        )
        self.output_layer = _output_layer(config, vocabulary, own_weight=False) if tied else None

    def forward(self, inputs: Inputs) -> Inputs:
        """(tokens, position ids, ...) [b, s] -> (rows [b, s, h], position ids)."""
        tokens, positions = inputs[:2]
        return self.word_embeddings(tokens), positions

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [s(/tp), b, h] -> [s, b, v/tp]."""
        assert self.output_layer is not None
        return self.output_layer(hidden, weight=self.word_embeddings.weight)[0]


class Positions(torch.nn.Module):
    """Learned positions if there are any, sequence shards, dropout: the rest of LanguageModelEmbedding."""

    gpt_prefix = "embedding."

    def __init__(self, config: TransformerConfig, rows: int | None) -> None:
        super().__init__()
        self.config = config
        self.position_embeddings = None if rows is None else torch.nn.Embedding(rows, config.hidden_size)
        self.dropout = torch.nn.Dropout(config.hidden_dropout)

    def forward(self, inputs: Inputs) -> Tensor:
        """(rows [b, s, h], position ids [b, s]) -> hidden [s(/tp), b, h]; rows come as [s/tp, b, h] without
        learned positions under sequence parallelism."""
        hidden, positions = inputs
        sharded = self.config.sequence_parallel
        if self.position_embeddings is not None:
            hidden = hidden + self.position_embeddings(positions)
        if self.position_embeddings is not None or not sharded:
            hidden = hidden.transpose(0, 1).contiguous()
        if not sharded:
            return self.dropout(hidden)
        if self.position_embeddings is not None:
            hidden = tensor_parallel.scatter_to_sequence_parallel_region(hidden)
        with tensor_parallel.get_cuda_rng_tracker().fork():
            return self.dropout(hidden)


class Block(torch.nn.Module):
    """Transformer layer `number`, counted from 1 through all stages.

    wrap: see models/recompute.py; None keeps all activations.
    attention_mask: of the microbatch whose forward runs now (models/attention.py); None: causal over whole rows.
    """

    def __init__(self, config: TransformerConfig, model: ModelConfig, number: int) -> None:
        super().__init__()
        self.gpt_prefix = f"decoder.layers.{number - 1}."
        self.layer = build_module(layer_spec(model, number - 1), config=config, layer_number=number)
        self.tensor_parallel = config.tensor_model_parallel_size if config.sequence_parallel else 1
        self.rotary: RotaryEmbedding | None = None
        self.wrap: Wrap | None = None
        self.attention_mask: Tensor | None = None
        if model.position_embedding_type == "rope":
            self.rotary = RotaryEmbedding(
                kv_channels=config.kv_channels,
                rotary_percent=model.rotary_percent,
                rotary_base=model.rotary_base,
                use_cpu_initialization=True,
            )

    def _run(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        rotary = None if self.rotary is None else self.rotary(hidden.shape[0] * self.tensor_parallel)
        hidden, _ = self.layer(hidden_states=hidden, attention_mask=mask, rotary_pos_emb=rotary)
        return hidden

    def _as_now(self) -> Callable[[Tensor], Tensor]:
        """`_run` with mask and dropout as now: the stream goes back and forth between evaluation and training."""
        training, mask = self.training, self.attention_mask

        def run(hidden: Tensor) -> Tensor:
            before = self.training
            self.train(training)
            try:
                return self._run(hidden, mask)
            finally:
                self.train(before)

        return run

    def forward(self, hidden: Tensor) -> Tensor:
        """[s(/tp), b, h] -> [s(/tp), b, h]."""
        if self.wrap is None or not torch.is_grad_enabled():
            return self._run(hidden, self.attention_mask)
        return recomputed(self.wrap(self._as_now()), hidden)


class FinalNorm(torch.nn.Module):
    """The norm after the last layer."""

    gpt_prefix = "decoder."

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.final_layernorm = Norm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.final_layernorm(hidden)


class Output(torch.nn.Module):
    """An output layer with weights of its own."""

    gpt_prefix = ""

    def __init__(self, config: TransformerConfig, vocabulary: int) -> None:
        super().__init__()
        self.output_layer = _output_layer(config, vocabulary, own_weight=True)

    def forward(self, hidden: Tensor) -> Tensor:
        """[s(/tp), b, h] -> logits [s, b, v/tp]."""
        return self.output_layer(hidden)[0]


def _output_layer(config: TransformerConfig, vocabulary: int, own_weight: bool) -> ColumnParallelLinear:
    return ColumnParallelLinear(
        config.hidden_size,
        vocabulary,
        config=config,
        init_method=config.init_method,
        bias=False,
        gather_output=False,
        skip_weight_param_allocation=not own_weight,
    )


class PipelineLoss:
    """What the last stage makes of its logits; also how a microbatch is split between the two end stages."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    @staticmethod
    def split(microbatch: Mapping[str, Tensor]) -> tuple[Inputs, Labels]:
        """What the first and the last stage read of a microbatch; all stages read `documents` of the first one's
        inputs (`GPTPipeline.expect`)."""
        names = ("tokens", "position_ids", "documents")
        return (
            tuple(microbatch[name] for name in names if name in microbatch),
            (microbatch["labels"], microbatch["loss_mask"]),
        )

    def token_losses(self, logits: Tensor, labels: Labels) -> Tensor:
        """logits [s, b, v/tp] -> losses per token [b, s], fp32, neither masked nor reduced."""
        mask_padding(logits, self.vocab_size, parallel_state.get_tensor_model_parallel_rank())
        by_position = labels[0].transpose(0, 1).contiguous()
        losses = tensor_parallel.vocab_parallel_cross_entropy(logits.float(), by_position)
        return losses.transpose(0, 1).contiguous()

    def __call__(self, logits: Tensor, labels: Labels) -> Tensor:
        """Mean over the microbatch's loss tokens: Megatron's default convention."""
        return masked_mean(self.token_losses(logits, labels), labels[1])
