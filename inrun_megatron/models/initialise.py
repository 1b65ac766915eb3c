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
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
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
    filler = _Filler(config, vocab_size, seed, tp_rank, tp_size, gather)
    for path, module in model.named_modules():
        if list(module.parameters(recurse=False)):
            filler.fill(module, path, gpt_name(f"{path}.weight"))
    left = [name for name, parameter in model.named_parameters() if id(parameter) not in filler.done]
    if left:
        raise ValueError(f"no initialisation is known for the parameters {', '.join(left)}")


class _Filler:
    """Fills modules, one after the other."""

    def __init__(
        self,
        config: TransformerConfig,
        vocab_size: int,
        seed: int,
        tp_rank: int,
        tp_size: int,
        gather: Gather,
    ) -> None:
        self._config, self._vocab_size, self._seed = config, vocab_size, seed
        self._tp_rank, self._tp_size, self._gather = tp_rank, tp_size, gather
        self.done: set[int] = set()  # id(parameter) of those that are filled

    def fill(self, module: torch.nn.Module, path: str, name: str) -> None:
        """path: in the model. name: of its weight, which keys the stream that it is drawn from."""
        config = self._config
        match module:
            case VocabParallelEmbedding():
                shape = (module.num_embeddings, module.embedding_dim)
                master = self._master(name, shape, config.embedding_init_method, self._vocab_size)
                self._split(module.weight, master, dim=0)
            case ColumnParallelLinear():
                if module.weight is not None:
                    gated = config.gated_linear_unit and path.endswith("linear_fc1")
                    rows = self._vocab_size if path.endswith("output_layer") else None
                    shape = (module.output_size, module.input_size)
                    master = self._master(name, shape, config.init_method, rows)
                    self._split(module.weight, master, dim=0, stride=2 if gated else 1)
                self._zero(module.bias)
            case RowParallelLinear():
                shape = (module.output_size, module.input_size)
                self._split(module.weight, self._master(name, shape, config.output_layer_init_method), dim=1)
                self._zero(module.bias)
            case TopKRouter():
                shape = (config.num_moe_experts or 0, config.hidden_size)
                self._fill(module.weight, self._master(name, shape, config.init_method))
            case SharedExpertMLP():
                shape = (1, config.hidden_size)
                gate = name.removesuffix("weight") + "gate_weight"
                self._fill(module.gate_weight, self._master(gate, shape, config.init_method))
            case torch.nn.Embedding():
                shape = (module.num_embeddings, module.embedding_dim)
                self._fill(module.weight, self._master(name, shape, config.embedding_init_method))
            case torch.nn.LayerNorm() | torch.nn.RMSNorm():
                self._fill(module.weight, lambda: torch.ones(()))
                self._zero(getattr(module, "bias", None))

    def _fill(self, parameter: torch.Tensor, value: Callable[[], torch.Tensor]) -> None:
        with self._gather(parameter):
            parameter.data.copy_(value())
        self.done.add(id(parameter))

    def _split(
        self, parameter: torch.nn.Parameter, master: Callable[[], torch.Tensor], dim: int, stride: int = 1
    ) -> None:
        _mark(parameter, dim, stride)
        self._fill(parameter, lambda: shard(master(), dim, stride, self._tp_rank, self._tp_size))

    def _zero(self, parameter: torch.Tensor | None) -> None:
        if parameter is not None:
            self._fill(parameter, lambda: torch.zeros(()))

    def _master(
        self, name: str, shape: tuple[int, int], init: Callable, rows: int | None = None
    ) -> Callable[[], torch.Tensor]:
        """Draws the whole weight; only its first `rows` where they are given, the others are 0."""

        def master() -> torch.Tensor:
            weight = torch.zeros(shape, dtype=torch.float32)
            with _stream(self._seed, name):
                init(weight[:rows])
            return weight

        return master
