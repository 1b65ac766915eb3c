"""The same GPT as a DeepSpeed PipelineModule of megatron-core blocks.

    word embeddings | positions, dropout | layer 1 ... layer n | final norm | output layer
    first stage ------------------------>  n / P per stage     < ----------- last stage

Between stages one tensor travels: hidden states [s(/tp), b, h]. Parameters are those of models/gpt.py: same
names (`gpt_name`), same streams, so that every pipeline size starts from the same weights. Tied embeddings live on
the first and on the last stage as replicas (DeepSpeed's TiedLayerSpec sums their gradients and counts them once).

Shapes: s sequence, b microbatch rows, h hidden size, v padded vocabulary; `/tp` marks a tensor-parallel shard.
"""

from __future__ import annotations

import contextlib
import io
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from megatron.core import parallel_state

from inrun_megatron.defaults import padded_vocabulary
from inrun_megatron.errors import UserError
from inrun_megatron.models import cpu
from inrun_megatron.models.attention import document_mask
from inrun_megatron.models.gpt import transformer_config
from inrun_megatron.models.initialise import initialise
from inrun_megatron.models.recompute import Wrap
from inrun_megatron.models.stages import Block, FinalNorm, Output, PipelineLoss, Positions, WordEmbeddings

if TYPE_CHECKING:
    from inrun_megatron.model_config import ModelConfig


class GPTPipeline(PipelineModule):
    """One stage of the pipeline."""

    _documents: deque[torch.Tensor | None] | None = None

    def expect(self, inputs: Sequence[Any]) -> None:
        """Say what the coming forwards are of, in their order: the first stage's inputs of every microbatch.

        Only hidden states travel between stages, but every stage's attention needs to know the documents. All ranks of
        a replica hold the microbatches, and every stage runs their forwards in the same order.

        Raises:
            UserError: documents, and DeepSpeed's own activation checkpoints.
        """
        coming = [documents[0] if documents else None for _, _, *documents in inputs]
        interval = self.activation_checkpoint_interval
        if interval and any(documents is not None for documents in coming):
            raise UserError(
                f"activation_checkpoint_interval {interval} with microbatches that are cut at documents: the recomputed forward "
                f"would not cut its attention; leave it at 0 and call module.recompute()"
            )
        self._documents = deque(coming)

    def forward(self, forward_input: Any) -> Any:
        """This stage's layers for the next microbatch."""
        if self._documents is None:
            if isinstance(forward_input, tuple) and len(forward_input) > 2:
                raise UserError(
                    "the microbatch is cut at documents, but the stages were not told: call module.expect(inputs)"
                )
            return super().forward(forward_input)
        documents = self._documents.popleft()
        self._documents = self._documents or None
        mask = None if documents is None else document_mask(documents)
        blocks = list(self.blocks())
        for block in blocks:
            block.attention_mask = mask
        try:
            return super().forward(forward_input)
        finally:
            for block in blocks:
                block.attention_mask = None

    def gpt_name(self, name: str) -> str:
        """GPTModel's name for a parameter (of this stage) called `name` here."""
        tied = name.startswith("tied_modules.")
        _, layer, own = name.split(".", 2) if tied else ("", *name.split(".", 1))
        module = self.tied_modules[layer] if tied else getattr(self, layer)
        return str(module.gpt_prefix) + own.removeprefix("layer.")

    def blocks(self) -> Iterator[Block]:
        """The transformer layers of this stage."""
        return (module for module in self.modules() if isinstance(module, Block))

    def recompute(self, wrap: Wrap = lambda function: function) -> None:
        """Keep only the input of every transformer layer and run it again in the backward pass."""
        for block in self.blocks():
            block.wrap = wrap


def build_pipeline(
    model: ModelConfig, *, vocab_size: int, seq_length: int, seed: int, sequence_parallel: bool = False
) -> GPTPipeline:
    """This rank's stage; megatron.core's parallel_state must be initialised with the pipeline size.

    Same arguments and same parameters as `build_gpt`.

    Raises:
        UserError: the stages cannot have equally many transformer layers.
    """
    cpu.install()
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    if model.num_layers % stages:
        raise UserError(
            f"--num-layers {model.num_layers} is no multiple of --pipeline-model-parallel-size {stages}"
        )
    # The pipeline size stays 1 in this configuration: layers are numbered through by us, not offset by Megatron.
    config = transformer_config(model, tensor_parallel=tp_size, sequence_parallel=sequence_parallel)
    vocabulary = padded_vocabulary(vocab_size, model.make_vocab_size_divisible_by, tp_size)
    learned = model.position_embedding_type == "learned_absolute"
    embedding: tuple[Any, ...] = (WordEmbeddings, config, vocabulary, learned)
    if model.untie_embeddings_and_output_weights:
        first, last = LayerSpec(*embedding, False), LayerSpec(Output, config, vocabulary)
    else:
        first, last = (
            TiedLayerSpec(
                "embedding",
                *embedding,
                True,
                forward_fn=function,
                tied_weight_attr="word_embeddings.weight",
            )
            for function in (None, WordEmbeddings.logits)
        )
    layers = [
        first,
        LayerSpec(Positions, config, (model.max_position_embeddings or seq_length) if learned else None),
        *(LayerSpec(Block, config, model, number) for number in range(1, model.num_layers + 1)),
        LayerSpec(FinalNorm, config),
        last,
    ]
    # PipelineModule prints its plan, progress bar or not; and it broadcasts tied weights in place, which torch warns of
    # in every backward pass unless gradients are off.
    with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        module = GPTPipeline(
            layers,
            topology=matching_topology(),
            loss_fn=PipelineLoss(vocab_size),
            partition_method="type:Block",
        )
    assert len(list(module.blocks())) == model.num_layers // stages, f"uneven stages: {module.parts}"
    initialise(
        module,
        config,
        vocab_size=vocab_size,
        seed=seed,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=tp_size,
        gpt_name=module.gpt_name,
    )
    return module


def matching_topology() -> PipeModelDataParallelTopology:
    """DeepSpeed's topology (pipe, data, model; the last one runs fastest) for Megatron's groups.

    Megatron's default order is the same (tp-cp-ep-dp-pp, the first one runs fastest); checked by this rank's numbers.
    """
    place = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    topology = PipeModelDataParallelTopology(
        num_pp=parallel_state.get_pipeline_model_parallel_world_size(),
        num_mp=parallel_state.get_tensor_model_parallel_world_size(),
        num_dp=parallel_state.get_data_parallel_world_size(),
    )
    rank = torch.distributed.get_rank()
    coordinates = topology.get_coord(rank)
    assert (coordinates.pipe, coordinates.data, coordinates.model) == place, (
        f"rank {rank}: DeepSpeed's {coordinates} is Megatron's (pipe, data, model) = {place}"
    )
    return topology
