"""A training run under one parallel layout, as a case of a test: what the oracle and real engines (layout_runs.py) run."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from inrun_megatron.model_config import ModelConfig
from tests.oracle import (
    GlobalBatch,
    OracleRun,
    OracleTarget,
    OracleTrainer,
    Parameters,
    random_rows,
    split_batch,
)
from tests.oracle_experts import BALANCE, Z
from tests.oracle_gpt import GPTShape, random_parameters
from tests.oracle_optimizer import OptimizerSpec
from tests.small_models import LLAMA

VOCABULARY, SEQUENCE, EOD = 61, 12, 0
TARGET_SEQUENCES = (5, 3)  # two targets, of several sequences each; microbatches of 2 divide neither


Trainer = TypeVar("Trainer", bound=OracleTrainer)


def with_documents(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows cut at random by end-of-document tokens; `documents` [b, s] by the package's own rule.

    Among them a document of one token, one that ends with its row, and rows of a single document.
    """
    from inrun_megatron.data.megatron import document_ids

    tokens = rows["tokens"].clone()
    generator = torch.Generator().manual_seed(int(tokens.sum()))
    tokens[tokens == EOD] = EOD + 1
    tokens[torch.rand(tokens.shape, generator=generator) < 0.2] = EOD
    tokens[0, [0, -1]] = EOD
    tokens[-1, :-2] = EOD + 2
    labels = torch.cat((tokens[:, 1:], rows["labels"][:, -1:]), dim=1)
    return {**rows, "tokens": tokens, "labels": labels, "documents": document_ids(tokens, EOD)}


def positions_in(documents: Tensor) -> Tensor:
    """Positions that start at 0 with each document, [b, s]."""
    return torch.tensor(
        [[t - row[: t + 1].index(row[t]) for t in range(len(row))] for row in documents.tolist()]
    )


@dataclass(frozen=True)
class LayoutCase:
    """A layout on `world` ranks; data parallel is what is left of the world."""

    world: int
    tp: int
    sp: bool
    zero: int
    accumulation: int
    shape: Literal["gpt2", "llama"]
    optimizer: Literal["sgd", "momentum", "adamw", "adam"] = "adamw"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    micro_batch: int = 2
    recompute: bool = False
    steps: int = 3
    scoring: bool = True
    proxy: bool = False
    grad_accum_fp32: bool = False
    dropout: float = 0.0  # the oracle has none
    pp: int = 1
    layers: int = 2
    tied: bool | None = None  # None: gpt2 is, llama is not
    estimator: str = "first_order"
    base: str = "current"
    credit: str = "step"
    granularity: Literal["sample", "document", "token"] = "sample"
    reset_attention: bool = False  # attention and positions start anew with each document
    scale_power: int = 10  # fp16's first loss scale, as a power of 2
    refresh: int = 1
    direction_dtype: str = "fp32"
    lr_growth: float = 1.0  # of the learning rate from step to step
    checkpoints: bool = (
        False  # recompute by the pipeline engine's own activation checkpoints, which know no taps
    )
    second_copy: int = 1  # ZeRO-3: ranks of a node that share a further copy of the weights (hpZ)
    qk_layernorm: bool = False
    experts: int | None = None  # of every layer, two for a token; llama's shape, which has no biases
    shared_expert: bool = False  # one for every token, with a gate
    balance: str | None = None  # losses that balance experts
    frozen: tuple[str, ...] = ()  # parameters whose names begin with one of these do not train

    @property
    def dp(self) -> int:
        return self.world // (self.tp * self.pp)

    def model(self) -> GPTShape:
        groups = None if self.shape == "gpt2" else max(2, self.tp)
        # Padded to a multiple of 4 whatever the layout, so that all layouts of a shape share their weights.
        return GPTShape(
            self.shape,
            self.layers,
            32,
            4,
            VOCABULARY,
            SEQUENCE,
            num_query_groups=groups,
            tied=self.tied,
            qk_layernorm=self.qk_layernorm,
            experts=self.experts,
            shared_ffn=16 if self.shared_expert and self.experts else None,
            balance=self.balance,
        )

    def config(self) -> ModelConfig:
        """The package's description of the same model; dropout, which the oracle has not, is the case's."""
        model = self.model()
        llama = {**LLAMA, "group_query_attention": True, "num_query_groups": model.groups}
        settings = {
            "num_layers": model.num_layers,
            "hidden_size": model.hidden_size,
            "ffn_hidden_size": model.ffn,
            "num_attention_heads": model.num_attention_heads,
            "make_vocab_size_divisible_by": 1,
            "qk_layernorm": self.qk_layernorm,
            "hidden_dropout": self.dropout,
            "attention_dropout": self.dropout,
            **(llama if self.shape == "llama" else {}),
            "untie_embeddings_and_output_weights": not model.is_tied,
        }
        if model.experts is not None:
            settings |= {
                "num_experts": model.experts,
                "moe_ffn_hidden_size": model.expert_ffn,
                "moe_router_topk": model.topk,
                "moe_shared_expert_intermediate_size": model.shared_ffn,
                "moe_shared_expert_gate": model.shared_ffn is not None,
                "moe_router_load_balancing_type": model.balance or "none",
                "moe_aux_loss_coeff": BALANCE if model.balance else 0.0,
                "moe_z_loss_coeff": Z if model.balance else None,
            }
        return ModelConfig(**settings)

    def spec(self) -> OptimizerSpec:
        clip = 0.5
        return {
            "sgd": OptimizerSpec("sgd", clip=clip, weight_decay=0.01),
            "momentum": OptimizerSpec("sgd", momentum=0.9, nesterov=True, clip=clip),
            "adam": OptimizerSpec("adam", clip=clip, weight_decay=0.05),
            "adamw": OptimizerSpec("adamw", clip=clip, weight_decay=0.1),
        }[self.optimizer]

    @property
    def lr(self) -> float:
        return 0.05 if self.optimizer in ("sgd", "momentum") else 2e-3

    def batches(self) -> list[GlobalBatch]:
        rows = self.dp * self.accumulation * self.micro_batch
        shape = self.model()
        return [
            split_batch(
                self._cut(random_rows(shape, rows, seed=100 + t, first_sample=t * rows)),
                self.dp,
                self.accumulation,
                self.micro_batch,
            )
            for t in range(self.steps)
        ]

    def targets(self) -> list[OracleTarget]:
        shape = self.model()
        return [
            OracleTarget(f"target{k}", self._cut(random_rows(shape, n, seed=k)))
            for k, n in enumerate(TARGET_SEQUENCES)
        ]

    def _cut(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """The rows with documents of their own lengths, where the case has to do with documents or parts."""
        if self.granularity == "sample" and not self.reset_attention:
            return rows
        rows = with_documents(rows)
        documents = rows.pop("documents")
        if self.reset_attention:
            rows |= {"documents": documents, "position_ids": positions_in(documents)}
        if self.granularity == "token":
            rows["segments"] = torch.arange(SEQUENCE).expand_as(documents)
        elif self.granularity == "document":
            rows["segments"] = documents
        return rows

    def parameters(self) -> Parameters:
        """Full initial weights: DeepSpeed's fp32 masters are copies of the model's rounded weights."""
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]
        return {n: p.to(dtype).double() for n, p in random_parameters(self.model(), seed=7).items()}

    def trainer(self, kind: type[Trainer]) -> Trainer:
        return kind(
            self.model(),
            self.parameters(),
            self.spec(),
            lambda t: self.lr * self.lr_growth ** (t - 1),
            self.targets(),
            proxy=self.proxy,
            estimator=self.estimator,
            base=self.base,
            refresh=self.refresh,
            frozen=[name for name in self.parameters() if name.startswith(self.frozen)],
        )

    def oracle(self) -> OracleRun:
        """The oracle's run; equal cases share one."""
        return _oracle(self)


@functools.lru_cache(maxsize=64)
def _oracle(case: LayoutCase) -> OracleRun:
    return case.trainer(OracleTrainer).run(case.batches())
