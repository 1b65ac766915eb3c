"""A training job as numbers, and the parameters that each of its ranks holds.

Symbols: h hidden size, s sequence length, t tensor-parallel, p pipeline-parallel, d data-parallel size, K targets.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil, inf, prod

from inrun_megatron.defaults import default_base
from inrun_megatron.errors import UserError
from inrun_megatron.model_config import ModelConfig
from inrun_megatron.plan.costs import DIRECTION_BYTES, EstimatorCost, estimator_cost
from inrun_megatron.training.model_checks import check_widths
from inrun_megatron.wording import flag_of

_POSITIVE = (
    "vocab_size",
    "seq_length",
    "world_size",
    "global_batch_size",
    "micro_batch_size",
    "tensor_parallel",
    "pipeline_parallel",
    "targets",
    "target_sequences",
    "interval",
    "refresh",
    "train_iters",
    "segments",
)


@dataclass(frozen=True)
class Parameter:
    """One parameter of one rank.

    shape: of this rank's tensor-parallel part. uses: how often a microbatch passes through it. summed: a replicated
    parameter that sees sequence shards or the rank's own heads, so that its gradient is summed over tensor-parallel
    ranks. linear: of a linear layer. share: of the tokens that pass through it, an expert's where they are spread evenly.
    """

    name: str
    shape: tuple[int, ...]
    uses: int = 1
    summed: bool = False
    linear: bool = False
    share: float = 1.0

    @property
    def numel(self) -> int:
        """Elements of this rank's part."""
        return prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a run is to be. vocab_size: with padding. target_sequences: of each target. segments: rows per sample in the
    ledger (documents or tokens with a finer --shapley-granularity).

    Raises UserError where the numbers do not fit together.
    """

    model: ModelConfig
    vocab_size: int
    seq_length: int
    world_size: int
    global_batch_size: int
    micro_batch_size: int = 1
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    sequence_parallel: bool = False
    zero_stage: int = 1
    parameter_bytes: int = 2
    recompute: bool = False
    adam: bool = True
    clips: bool = True
    targets: int = 1
    target_sequences: int = 16
    target_micro_batch_size: int | None = None
    interval: int = 1
    estimator: str = "first_order"
    base: str | None = None
    refresh: int = 1
    direction_dtype: str = "fp32"
    segments: float = 1.0
    train_iters: int = 1000

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if not 0 < getattr(self, name) < inf:
                raise UserError(f"{flag_of(name)} is {getattr(self, name)}: it must be positive and finite")
        if self.target_micro_batch_size is not None and self.target_micro_batch_size < 1:
            raise UserError(
                f"--target-micro-batch-size is {self.target_micro_batch_size}: it must be positive; leave it out for "
                "--micro-batch-size"
            )
        self._require_layout()
        if self.refresh > 1 and self.estimator != "first_order":
            raise UserError(
                f"--refresh {self.refresh} with --estimator {self.estimator}: only first_order's direction serves "
                f"another step; leave --refresh out"
            )

    def _require_layout(self) -> None:
        """The GPUs can share the model and the batch."""
        t, p = self.tensor_parallel, self.pipeline_parallel
        check_widths(self.model, t, self.sequence_parallel)
        if self.world_size % (t * p):
            raise UserError(
                f"{self.world_size} GPUs are no multiple of tensor x pipeline parallel = {t} x {p}"
            )
        rows = self.data_parallel * self.micro_batch_size
        if self.global_batch_size % rows:
            raise UserError(
                f"--global-batch-size {self.global_batch_size} is no multiple of data parallel x micro batch = "
                f"{self.data_parallel} x {self.micro_batch_size}"
            )
        if self.zero_stage not in (0, 1, 2, 3):
            raise UserError(f"--zero-stage {self.zero_stage} does not exist: use 0, 1, 2 or 3")
        if p > 1 and self.zero_stage > 1:
            raise UserError(
                f"ZeRO stage {self.zero_stage} does not work with {p} pipeline stages: use --zero-stage 0 or 1"
            )
        if p > self.model.num_layers:
            raise UserError(f"{self.model.num_layers} layers cannot be cut into {p} pipeline stages")

    @property
    def data_parallel(self) -> int:
        """Replicas of the model."""
        return self.world_size // (self.tensor_parallel * self.pipeline_parallel)

    @property
    def microbatches(self) -> int:
        """Training microbatches of one rank and step."""
        return self.global_batch_size // (self.data_parallel * self.micro_batch_size)

    @property
    def _target_microbatches(self) -> int:
        """Of one rank and target (data/targets.py: Target.microbatches)."""
        limit = self.target_micro_batch_size or self.micro_batch_size
        return ceil(ceil(self.target_sequences / self.data_parallel) / limit)

    @property
    def validation_microbatches(self) -> int:
        """Of one rank, all targets."""
        return self.targets * self._target_microbatches

    @property
    def validation_rows(self) -> int:
        """Rows of a validation microbatch, those that only fill it up included; a pipeline has one size for all."""
        if self.pipeline_parallel > 1:
            return self.micro_batch_size
        return ceil(ceil(self.target_sequences / self.data_parallel) / self._target_microbatches)

    @property
    def direction_bytes(self) -> int:
        """Of one element of a direction, as layers read it."""
        return DIRECTION_BYTES[self.direction_dtype]

    @property
    def resolved_base(self) -> str:
        """The base point, the layout's own where none is given."""
        return self.base or default_base(self.pipeline_parallel)

    @property
    def cost(self) -> EstimatorCost:
        """Passes and gathers of the estimator at this base point."""
        return estimator_cost(self.estimator, self.resolved_base)

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """Of the rank with the most elements: that of the fullest pipeline stage."""
        return max(map(self.stage_parameters, {0, self.pipeline_parallel - 1}), key=count)

    def stage_parameters(self, stage: int) -> tuple[Parameter, ...]:
        """Parameters of one rank of a stage, embeddings and norms included."""
        model, t, h = self.model, self.tensor_parallel, self.model.hidden_size
        first, last = stage == 0, stage == self.pipeline_parallel - 1
        tied = not model.untie_embeddings_and_output_weights
        found: list[Parameter] = []
        if first:
            uses = 2 if tied and last else 1
            found.append(Parameter("embedding", (self.vocab_size // t, h), uses, linear=uses == 2))
            if model.position_embedding_type == "learned_absolute":
                rows = model.max_position_embeddings or self.seq_length
                found.append(Parameter("position", (rows, h)))
        for layer in self.stage_layers(stage):
            found += self.layer_parameters(layer)
        if last:
            found += self._norm("final")
            if not tied or not first:
                found.append(Parameter("output", (self.vocab_size // t, h), linear=True))
        return tuple(found)

    def stage_layers(self, stage: int) -> range:
        """Numbers of a stage's layers."""
        layers = ceil(self.model.num_layers / self.pipeline_parallel)
        return range(stage * layers, min((stage + 1) * layers, self.model.num_layers))

    def layer_parameters(self, layer: int) -> list[Parameter]:
        """Parameters of one rank of one layer."""
        model, t, h = self.model, self.tensor_parallel, self.model.hidden_size
        queries = model.num_attention_heads * model.resolved_kv_channels
        qkv = queries + 2 * model.query_groups * model.resolved_kv_channels
        found = self._norm("attention norm") + self._norm("mlp norm")
        shapes = [("qkv", (qkv // t, h)), ("projection", (h, queries // t))]
        if not model.has_experts(layer):
            shapes += self._feed_forward("", model.resolved_ffn_hidden_size)
        for name, shape in shapes:
            found.append(Parameter(name, shape, linear=True))
            if not model.disable_bias_linear or (name == "qkv" and model.add_qkv_bias):
                row = name in ("projection", "fc2")
                found.append(Parameter(f"{name} bias", shape[:1], summed=self.sequence_parallel and row))
        if model.has_experts(layer):
            found += self._experts()
        if model.qk_layernorm:
            found += self._norm("query norm", model.resolved_kv_channels, summed=t > 1)
            found += self._norm("key norm", model.resolved_kv_channels, summed=t > 1)
        return found

    def _feed_forward(self, name: str, width: int) -> list[tuple[str, tuple[int, int]]]:
        t, h = self.tensor_parallel, self.model.hidden_size
        wide = width * (2 if self.model.swiglu else 1)
        return [(f"{name}fc1", (wide // t, h)), (f"{name}fc2", (h, width // t))]

    def _experts(self) -> list[Parameter]:
        """Of one layer: its router, its experts and the one that all tokens pass through."""
        model = self.model
        count, shared = model.num_experts, model.moe_shared_expert_intermediate_size
        assert count is not None
        router = (count, model.hidden_size)
        found = [Parameter("router", router, summed=self.sequence_parallel, linear=True)]
        share = model.moe_router_topk / count
        for own in range(count):
            for name, shape in self._feed_forward(f"expert {own} ", model.resolved_moe_ffn_hidden_size):
                found.append(Parameter(name, shape, linear=True, share=share))
        if shared is not None:
            found += [
                Parameter(name, shape, linear=True) for name, shape in self._feed_forward("shared ", shared)
            ]
        if model.moe_shared_expert_gate:
            gate = (1, model.hidden_size)
            found.append(Parameter("shared gate", gate, summed=self.sequence_parallel, linear=True))
        return found

    def _norm(self, name: str, width: int | None = None, summed: bool | None = None) -> list[Parameter]:
        parts = ("scale",) if self.model.normalization == "RMSNorm" else ("scale", "shift")
        shape = (self.model.hidden_size if width is None else width,)
        summed = self.sequence_parallel if summed is None else summed
        return [Parameter(f"{name} {part}", shape, summed=summed) for part in parts]


def count(parameters: tuple[Parameter, ...]) -> int:
    """Elements of these parameters."""
    return sum(parameter.numel for parameter in parameters)
