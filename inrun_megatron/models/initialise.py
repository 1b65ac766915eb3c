"""Parameter initialisation that is the same for every tensor-parallel size, vocabulary padding and rank count.

megatron-core draws each layer's weights from one running stream, so the numbers depend on the order of construction
and on the padded size of the vocabulary (which depends on the tensor-parallel size). Here each parameter has a stream
of its own, keyed by the run's seed and the parameter's name: every rank draws the whole *master* weight in fp32 and
keeps its shard, as `_initialize_affine_weight_cpu` (megatron/core/tensor_parallel/layers.py) does.

Shards of a master weight W:
    column parallel   rows of W [out, in]
    row parallel      columns of W [out, in]
    vocabulary        rows of W [vocabulary, hidden]; padding rows are 0 and stay 0 (models/gpt.py)
    gated fc1         W = [gate; up], each split by rows: rank r holds [gate_r; up_r] (stride 2). The shards of
                      different TP sizes put together *by rank* are therefore a row permutation of one another.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron.core.transformer.transformer_config import TransformerConfig

Gather = Callable[[torch.Tensor], contextlib.AbstractContextManager]


def _same(name: str) -> str:
    return name


def _no_gather(parameter: torch.Tensor) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext()


@contextlib.contextmanager
def _stream(seed: int, name: str) -> Iterator[None]:
    """Draw from the stream of (seed, name); the default CPU stream is left where it was."""
    key = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(int.from_bytes(key[:8], "little") >> 1)
    try:
        yield
    finally:
        torch.set_rng_state(state)


@dataclass(frozen=True)
class Cut:
    """How tensor parallelism cuts a parameter: `stride` blocks along `dim`, each split over the ranks."""

    dim: int
    stride: int


VOCABULARY = ("word_embeddings.weight", "output_layer.weight")
"""Ends of the names of parameters with a row per word, padding rows among them."""


def cut_of(parameter: torch.Tensor) -> Cut | None:
    """How a parameter is cut; None when every tensor-parallel rank holds all of it."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return None
    return Cut(parameter.partition_dim, parameter.partition_stride)  # type: ignore[attr-defined]


def _mark(parameter: torch.nn.Parameter, dim: int, stride: int) -> None:
    """What `set_tensor_model_parallel_attributes` sets; DeepSpeed's gradient norm reads the first one."""
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    parameter.partition_dim = dim  # type: ignore[attr-defined]
    parameter.partition_stride = stride  # type: ignore[attr-defined]


def shard(master: torch.Tensor, dim: int, stride: int, rank: int, world: int) -> torch.Tensor:
    """This rank's part of a master weight: `stride` blocks along `dim`, each split over `world` ranks."""
    pieces = torch.chunk(master, stride, dim=dim)
    return torch.cat([torch.chunk(piece, world, dim=dim)[rank] for piece in pieces], dim=dim)


def joined(shards: list[torch.Tensor], cut: Cut) -> torch.Tensor:
    """The master weight that `shard` made these of, by rank."""
    pieces = [torch.chunk(own, cut.stride, dim=cut.dim) for own in shards]
    return torch.cat([piece[block] for block in range(cut.stride) for piece in pieces], dim=cut.dim)


@torch.no_grad()
def initialise(
    model: torch.nn.Module,
    config: TransformerConfig,
    *,
    vocab_size: int,
    seed: int,
    tp_rank: int,
    tp_size: int,
    gather: Gather = _no_gather,
    gpt_name: Callable[[str], str] = _same,
) -> None:
    """Fill every parameter of a GPTModel built with `perform_initialization=False`, or of a part of one.

    vocab_size: the vocabulary without padding. gather: context manager under which a parameter's storage is whole
    (ZeRO-3's `GatheredParameters`). gpt_name: what GPTModel calls a parameter of `model`. A parameter of a kind that is
    not known here is an error, never left as it is.
    """
    done: set[int] = set()

    def fill(parameter: torch.Tensor, value: Callable[[], torch.Tensor]) -> None:
        with gather(parameter):
            parameter.data.copy_(value())
        done.add(id(parameter))

    def normal(
        name: str, shape: tuple[int, int], init: Callable, rows: int | None = None
    ) -> Callable[[], torch.Tensor]:
        def master() -> torch.Tensor:
            weight = torch.zeros(shape, dtype=torch.float32)
            with _stream(seed, name):
                init(weight[:rows])
            return weight

        return master

    def split(
        parameter: torch.nn.Parameter, master: Callable[[], torch.Tensor], dim: int, stride: int = 1
    ) -> None:
        _mark(parameter, dim, stride)
        fill(parameter, lambda: shard(master(), dim, stride, tp_rank, tp_size))

    def zeros(parameter: torch.Tensor | None) -> None:
        if parameter is not None:
            fill(parameter, lambda: torch.zeros(()))

    for path, module in model.named_modules():
        if not list(module.parameters(recurse=False)):
            continue
        name = gpt_name(f"{path}.weight")
        if isinstance(module, VocabParallelEmbedding):
            shape = (module.num_embeddings, module.embedding_dim)
            split(module.weight, normal(name, shape, config.embedding_init_method, vocab_size), 0)
        elif isinstance(module, ColumnParallelLinear):
            if module.weight is not None:
                gated = config.gated_linear_unit and path.endswith("linear_fc1")
                rows = vocab_size if path.endswith("output_layer") else None
                shape = (module.output_size, module.input_size)
                split(module.weight, normal(name, shape, config.init_method, rows), 0, 2 if gated else 1)
            zeros(module.bias)
        elif isinstance(module, RowParallelLinear):
            shape = (module.output_size, module.input_size)
            split(module.weight, normal(name, shape, config.output_layer_init_method), 1)
            zeros(module.bias)
        elif isinstance(module, torch.nn.Embedding):
            shape = (module.num_embeddings, module.embedding_dim)
            fill(module.weight, normal(name, shape, config.embedding_init_method))
        elif isinstance(module, (torch.nn.LayerNorm, torch.nn.RMSNorm)):
            fill(module.weight, lambda: torch.ones(()))
            zeros(getattr(module, "bias", None))

    left = [name for name, parameter in model.named_parameters() if id(parameter) not in done]
    if left:
        raise ValueError(f"no initialisation is known for the parameters {', '.join(left)}")
