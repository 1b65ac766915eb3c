"""The configuration of a run: frozen dataclasses whose field docstrings are the help of the command line.

Flags are Megatron-LM's names (megatron/training/arguments.py) wherever Megatron-LM has the setting. Parsing and the
replayable YAML are in training/arguments.py, checks in training/validation.py, the merge with a DeepSpeed JSON in
training/deepspeed_config.py. A field that is None is decided there, in the order stated in its help.

A help is one line, however long: tyro wraps it to the terminal, but keeps the breaks of an indented text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from inrun_megatron.model_config import ModelConfig, Unset

Repeated = tyro.conf.UseAppendAction[tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training data: Megatron indexed datasets (`inrun prepare` writes them)."""

    data_path: tuple[str, ...]
    """Prefixes of .bin/.idx pairs: one, several, or weights and prefixes in turn (`0.7 a_document 0.3 b_document`)."""
    seq_length: int
    """Tokens per sample."""
    split: str = "969,30,1"
    """Shares of the documents for training, validation and test; those left out are 0."""
    tokenizer_type: str = "auto"
    """Tokenizer: auto (what the data was prepared with), bytes, or HuggingFaceTokenizer."""
    tokenizer_model: Unset[str] = None
    """Path of the tokenizer.json of --tokenizer-type HuggingFaceTokenizer."""
    vocab_size: Unset[int] = None
    """Vocabulary before padding. Default: the tokenizer's."""
    eod_mask_loss: bool = False
    """No loss where the input is an end-of-document token: for the first token of the next document."""
    reset_position_ids: bool = False
    """Positions start at 0 after each end of document."""
    reset_attention_mask: bool = False
    """Attention limited to the own document (use it with --reset-position-ids unless positions are rotary)."""
    data_cache_path: Unset[str] = None
    """Directory of the document, sample and shuffle indices. Default: beside the data."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Optimisation."""

    micro_batch_size: int
    """Samples per forward pass on one data-parallel rank."""
    train_iters: int
    """Optimizer steps of the whole run."""
    lr: float
    """Peak learning rate."""
    global_batch_size: Unset[int] = None
    """Samples per optimizer step over all ranks; a resume may change it. Default: micro batch size x data-parallel size."""
    min_lr: float = 0.0
    """Lowest learning rate of the schedule."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root"] = "linear"
    """Shape of the schedule after the warm-up."""
    lr_decay_iters: Unset[int] = None
    """Steps until --min-lr is reached. Default: --train-iters."""
    lr_warmup_iters: int = 0
    """Steps of linear warm-up. As in Megatron-LM the first step then has learning rate 0."""
    lr_warmup_fraction: Unset[float] = None
    """Warm-up as a share of --lr-decay-iters, instead of --lr-warmup-iters."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """adam is AdamW (decoupled weight decay)."""
    weight_decay: float = 0.01
    """Weight decay of matrices; biases, norms and other vectors have none."""
    clip_grad: Unset[float] = None
    """Largest global gradient norm; 0 switches clipping off. Default: the DeepSpeed JSON's, else 1.0."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.999
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Added to the root of the second moment."""
    sgd_momentum: float = 0.9
    """Momentum of --optimizer sgd."""
    bf16: bool = False
    """Train in bfloat16 with fp32 master weights."""
    fp16: bool = False
    """Train in float16 with fp32 master weights and loss scaling; with ZeRO stage 1, 2 or 3."""
    loss_scale: Unset[float] = None
    """Fixed loss scale of --fp16. Default: dynamic."""
    initial_loss_scale: Unset[float] = None
    """First dynamic loss scale, a power of 2. Default: 65536."""
    min_loss_scale: Unset[float] = None
    """Smallest dynamic loss scale. Default: 1."""
    loss_scale_window: Unset[int] = None
    """Steps without overflow after which the dynamic loss scale doubles. Default: 1000."""
    hysteresis: Unset[int] = None
    """Overflows before the dynamic loss scale halves. Default: 2."""
    check_for_nan_in_loss_and_grad: bool = True
    """End the run when the optimizer took a step with a loss or gradient norm that is not finite."""
    seed: int = 1234
    """Of parameters, dropout and the order of the data."""
    recompute_granularity: Unset[Literal["full"]] = None
    """full: keep only the input of each chunk of layers and compute the rest again in the backward pass."""
    recompute_method: Literal["uniform"] = "uniform"
    """uniform: chunks of equal size; read with --recompute-granularity only."""
    recompute_num_layers: int = 1
    """Layers per chunk; read with --recompute-granularity only."""
    eval_interval: int = 1000
    """Steps between evaluations on the validation split, and one at the end; 0 switches them off."""
    eval_iters: int = 100
    """Global batches of the validation split per evaluation, the same ones each time; 0 switches it off."""
    exit_interval: Unset[int] = None
    """Save and stop after the first step that is a multiple of this."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is spread over ranks."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer (TP)."""
    pipeline_model_parallel_size: int = 1
    """Pipeline stages (PP), each with the same number of layers; with ZeRO stage 0 or 1."""
    sequence_parallel: bool = False
    """Shard the sequence over the tensor-parallel ranks outside the linear layers."""
    zero_stage: Unset[int] = None
    """DeepSpeed ZeRO stage 0-3. Default: the DeepSpeed JSON's, else 0."""
    distributed_backend: Literal["auto", "gloo", "nccl"] = "auto"
    """auto: nccl with a GPU, gloo without."""
    distributed_timeout_minutes: float = 10.0
    """How long a collective waits for a rank before the run fails."""
    heartbeat_timeout: float = 60.0
    """Seconds without a sign of life after which a rank counts as lost and the run ends on all hosts."""
    deepspeed: bool = False
    """Accepted for compatibility; DeepSpeed is always used."""
    deepspeed_config: Unset[str] = None
    """DeepSpeed JSON. "auto" values are filled from the flags; a value that contradicts a flag is an error."""
    local_rank: int = -1
    """Set by the deepspeed launcher."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """The run directory and its checkpoints."""

    save: Unset[str] = None
    """Run directory: config.yaml, checkpoints/, shapley/ (the ledger), monitor/."""
    load: Unset[str] = None
    """Run directory to resume from. The same as --save: start there if it has no checkpoint yet."""
    save_interval: Unset[int] = None
    """Steps between checkpoints. Default: only at the end (none with 0)."""
    save_retain_interval: Unset[int] = None
    """Once the next checkpoint is written, delete one whose step is no multiple of this. Default: keep all."""


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Progress bar and monitors."""

    log_interval: int = 10
    """Steps between lines on a stderr that is no terminal, and between points in the monitors."""
    tensorboard_dir: Unset[str] = None
    """Write TensorBoard events there."""
    csv_dir: Unset[str] = None
    """Write one CSV file per figure there."""
    wandb_project: Unset[str] = None
    """Log to this project of Weights & Biases."""
    wandb_exp_name: Unset[str] = None
    """Group of the run in Weights & Biases, with --wandb-project; the variable WANDB_NAME gives it a name of its own."""


@dataclass(frozen=True, kw_only=True)
class ShapleyConfig:
    """In-Run Data Shapley: the value of every training sample towards validation targets."""

    enabled: Annotated[bool, tyro.conf.arg(name="shapley")] = True
    """Score samples. --no-shapley trains without."""
    target: Annotated[Repeated, tyro.conf.arg(name="shapley-target", metavar="NAME=PATH[:SEQUENCES]")] = ()
    """Validation target: a name, the prefix of its .bin/.idx pair, and how many sequences to use (default: all)."""
    estimator: Annotated[
        Literal["first_order", "midpoint", "simpson"], tyro.conf.arg(name="shapley-estimator")
    ] = "first_order"
    """first_order: the step linearised before the batch. midpoint, simpson: integrated along the step, with a second pass over the batch on scored steps (and three validation passes for simpson)."""
    base: Annotated[
        Literal["current", "drift"] | None, tyro.conf.arg(name="shapley-base", help_behavior_hint="")
    ] = None
    """Where first_order takes the validation gradient: at the current weights, or where momentum and weight decay alone would lead (the step's own starting point). Default: drift; under a pipeline current, where drift costs a flush."""
    credit: Annotated[Literal["step", "trajectory"], tyro.conf.arg(name="shapley-credit")] = "step"
    """step: the value of the sample in its own step. trajectory: with its gradient's weight in the coming steps, through the optimizer's momentum."""
    optimizer: Annotated[Literal["auto", "sgd"], tyro.conf.arg(name="shapley-optimizer")] = "auto"
    """auto: values for the optimizer that trains. sgd: the paper's SGD proxy under any optimizer."""
    granularity: Annotated[
        Literal["sample", "document", "token"], tyro.conf.arg(name="shapley-granularity")
    ] = "sample"
    """What gets a value of its own: each sample, each document in a sample (cut after end-of-document tokens), or each token position. The parts' values add up to the sample's."""
    interval: Annotated[int, tyro.conf.arg(name="shapley-interval")] = 1
    """Score every n-th step."""
    refresh: Annotated[int, tyro.conf.arg(name="shapley-refresh")] = 1
    """Take the direction (the validation pass) anew in every n-th scored step, and after each checkpoint; the steps between use the last one. Cheaper and less exact; with first_order."""
    direction_dtype: Annotated[Literal["fp32", "bf16"], tyro.conf.arg(name="shapley-direction-dtype")] = (
        "fp32"
    )
    """Storage of the directions: bf16 takes half the memory and rounds them once; sums are fp32 in both."""
    dir: Annotated[str | None, tyro.conf.arg(name="shapley-dir", help_behavior_hint="")] = None
    """Ledger directory. Default: shapley/ in the run directory (--save)."""
    micro_batch_size: Annotated[
        int | None, tyro.conf.arg(name="shapley-micro-batch-size", help_behavior_hint="")
    ] = None
    """Sequences per forward pass of the validation targets. Default: --micro-batch-size."""
    audit_interval: Annotated[int, tyro.conf.arg(name="shapley-audit-interval")] = 50
    """Steps between audits in the log and the monitors."""
    commit_interval: Annotated[int, tyro.conf.arg(name="shapley-commit-interval")] = 100
    """Steps between commits of the ledger apart from those at checkpoints."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Pretrain a GPT with megatron-core layers under DeepSpeed and value every training sample in the same run."""

    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    shapley: ShapleyConfig = field(default_factory=ShapleyConfig)
