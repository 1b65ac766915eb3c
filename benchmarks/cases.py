"""One line of a benchmark's table: what is trained and scored, and the ratio of times that could be had."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

from inrun_megatron.defaults import default_base
from inrun_megatron.model_config import ModelConfig
from inrun_megatron.plan.costs import EstimatorCost, estimator_cost
from tests.small_models import LLAMA


@dataclass(frozen=True)
class Case:
    """Tokens per sequence, sequences per step (validation: of each target), ranks of each kind."""

    name: str
    hidden: int
    layers: int
    seq_length: int
    train: int
    validation: int
    micro_batch: int
    zero_stage: int
    tp: int = 1
    dp: int = 1
    pp: int = 1
    shape: str = "gpt2"
    precision: str = "fp32"
    targets: int = 1
    granularity: str = "sample"
    estimator: str = "first_order"
    base: str | None = None  # None: the layout's default
    direction_dtype: str = "fp32"
    dropout: float = 0.1  # of training; validation has none

    @property
    def accumulation(self) -> int:
        """Training microbatches of one replica and step."""
        steps, rest = divmod(self.train, self.micro_batch * self.dp)
        if rest:
            raise ValueError(
                f"{self.train} sequences a step are no multiple of {self.dp} replicas x {self.micro_batch}"
            )
        return steps

    @property
    def validation_microbatches(self) -> int:
        """Of one replica, all targets."""
        return self.targets * ceil(ceil(self.validation / self.dp) / self.micro_batch)

    @property
    def cost(self) -> EstimatorCost:
        """Passes that the estimator takes."""
        return estimator_cost(self.estimator, self.base or default_base(self.pp))

    @property
    def work(self) -> float:
        """The passes of a scored step over those of a plain one; a forward is a third of a pass."""
        cost = self.cost
        ratio = self.targets * ceil(self.validation / self.dp) * self.dp / self.train
        return 1 + cost.batch_passes + ratio * (cost.validation_passes + cost.loss_passes / 3)

    @property
    def ideal(self) -> float:
        """The ratio of times that could be had: of the work, through a pipeline of the half-steps of its stream."""
        cost = self.cost
        if self.pp == 1 or cost.moves:
            return self.work
        bubble = self.accumulation + self.pp - 1
        return (self.validation_microbatches + bubble) / bubble

    def config(self) -> ModelConfig:
        """The model, with heads of 64."""
        return ModelConfig(
            num_layers=self.layers,
            hidden_size=self.hidden,
            num_attention_heads=max(1, self.hidden // 64),
            attention_dropout=self.dropout,
            hidden_dropout=self.dropout,
            **({} if self.shape == "gpt2" else LLAMA),
            **(self._experts if self.shape == "experts" else {}),
        )

    @property
    def _experts(self) -> dict[str, Any]:
        """Eight in every layer, two of them for a token: half as wide as Llama's layer, they multiply as much."""
        width = ModelConfig(num_layers=1, hidden_size=self.hidden, num_attention_heads=1, swiglu=True)
        return {"num_experts": 8, "moe_ffn_hidden_size": width.resolved_ffn_hidden_size // 2}
