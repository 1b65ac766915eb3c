"""Checks of a configuration that need nothing but its numbers: before any rank talks to another.

Each failed check is a UserError with the values and the remedy in one line.
"""

from __future__ import annotations

import math
from pathlib import Path

from inrun_megatron.config import Config, TrainingConfig
from inrun_megatron.errors import UserError
from inrun_megatron.training.model_checks import check_router, check_widths, divides, not_negative, positive
from inrun_megatron.wording import flag_of


def data_parallel_size(config: Config, world_size: int) -> int:
    """Replicas of the model on `world_size` ranks."""
    tp, pp = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    if world_size % (tp * pp):
        stages = f" x --pipeline-model-parallel-size {pp}" if pp > 1 else ""
        raise UserError(
            f"{world_size} ranks are no multiple of --tensor-model-parallel-size {tp}{stages}: "
            f"start a multiple of {tp * pp} ranks"
        )
    return world_size // (tp * pp)


def validate(config: Config, world_size: int) -> int:
    """All checks; returns the data-parallel size."""
    _no_nan(config)
    _parallel(config)
    data_parallel = data_parallel_size(config, world_size)
    _model(config)
    _training(config)
    _data(config)
    _run_directory(config)
    _scoring(config)
    return data_parallel


def _no_nan(config: Config) -> None:
    """NaN passes every comparison of the checks below."""
    for group in vars(config).values():
        for name, value in vars(group).items():
            if isinstance(value, float) and math.isnan(value):
                raise UserError(f"{flag_of(name)} is {value}: it must be a number")


def _below_one(**values: float) -> None:
    for name, value in values.items():
        if not 0.0 <= value < 1.0:
            raise UserError(f"{flag_of(name)} is {value}: it must be in [0, 1)")


def _parallel(config: Config) -> None:
    parallel = config.parallel
    positive(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
        heartbeat_timeout=parallel.heartbeat_timeout,
    )
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        raise UserError(
            "--sequence-parallel needs --tensor-model-parallel-size of at least 2, not 1: the sequence is sharded "
            "over the tensor-parallel ranks"
        )
    if parallel.zero_stage is not None and parallel.zero_stage not in (0, 1, 2, 3):
        raise UserError(f"--zero-stage {parallel.zero_stage} does not exist: use 0, 1, 2 or 3")


def check_fp16(config: Config) -> None:
    """fp16 has a loss scale at every ZeRO stage but 0; `config` is resolved with its DeepSpeed JSON."""
    if config.training.fp16 and config.parallel.zero_stage == 0:
        # deepspeed 0.19, DeepSpeedEngine.backward: only ZeRO's optimizers scale the loss, all divide by the scale.
        raise UserError(
            "--fp16 at ZeRO stage 0 loses DeepSpeed's loss scale: gradients are divided by it and the loss is not multiplied; "
            "use --zero-stage 1, 2 or 3"
        )


def check_pipeline(config: Config) -> None:
    """What a pipeline cannot do; `config` is resolved with its DeepSpeed JSON."""
    stages = config.parallel.pipeline_model_parallel_size
    if stages == 1:
        return
    flag = f"--pipeline-model-parallel-size {stages}"
    if config.parallel.zero_stage not in (0, 1):
        raise UserError(
            f"ZeRO stage {config.parallel.zero_stage} does not work with {flag}: DeepSpeed's pipeline keeps gradients "
            f"of all microbatches; use --zero-stage 0 or 1"
        )
    if config.parallel.zero_stage == 0 and config.training.bf16:
        # BF16_Optimizer shards its state over data-parallel ranks even then, but the checkpoint holds one shard, which
        # its load_state_dict refuses (deepspeed/runtime/bf16_optimizer.py).
        raise UserError(
            f"--bf16 with {flag} at ZeRO stage 0 writes checkpoints that DeepSpeed cannot load: use --zero-stage 1"
        )
    if config.model.num_layers % stages:
        raise UserError(f"{flag} does not divide --num-layers {config.model.num_layers}")
    micro = config.training.micro_batch_size
    if config.shapley.enabled and config.shapley.micro_batch_size not in (None, micro):
        raise UserError(
            f"--shapley-micro-batch-size {config.shapley.micro_batch_size} is not --micro-batch-size {micro}: with "
            f"{flag} stages exchange tensors of one shape; leave it out"
        )
    if config.training.recompute_granularity is not None and config.training.recompute_num_layers != 1:
        raise UserError(
            f"--recompute-num-layers {config.training.recompute_num_layers} is not supported with {flag}: use 1"
        )


def _model(config: Config) -> None:
    model, tp, sequence = config.model, config.parallel.tensor_model_parallel_size, config.data.seq_length
    check_widths(model, tp, config.parallel.sequence_parallel)
    check_router(model)
    positive(
        seq_length=sequence,
        make_vocab_size_divisible_by=model.make_vocab_size_divisible_by,
        init_method_std=model.init_method_std,
        rotary_base=model.rotary_base,
        norm_epsilon=model.norm_epsilon,
    )
    if config.parallel.sequence_parallel:
        divides(tp, "--seq-length (needed by --sequence-parallel)", sequence)
    positions = model.max_position_embeddings
    if positions is not None and positions < sequence:
        raise UserError(f"--max-position-embeddings {positions} is smaller than --seq-length {sequence}")
    if model.position_embedding_type == "rope" and model.resolved_kv_channels % 2:
        raise UserError(f"rotary positions need an even head width, not {model.resolved_kv_channels}")
    if not 0.0 < model.rotary_percent <= 1.0:
        raise UserError(f"--rotary-percent is {model.rotary_percent}: it must be in (0, 1]")
    _below_one(attention_dropout=model.attention_dropout, hidden_dropout=model.hidden_dropout)


def _training(config: Config) -> None:
    training = config.training
    positive(
        micro_batch_size=training.micro_batch_size,
        train_iters=training.train_iters,
        global_batch_size=training.global_batch_size,
        lr=training.lr,
        lr_decay_iters=training.lr_decay_iters,
        adam_eps=training.adam_eps,
        recompute_num_layers=training.recompute_num_layers,
        exit_interval=training.exit_interval,
        log_interval=config.logging.log_interval,
        shapley_interval=config.shapley.interval,
        shapley_refresh=config.shapley.refresh,
        shapley_micro_batch_size=config.shapley.micro_batch_size,
        shapley_audit_interval=config.shapley.audit_interval,
        shapley_commit_interval=config.shapley.commit_interval,
    )
    if not 0 <= training.seed < 2**32:
        raise UserError(
            f"--seed is {training.seed}: it must be from 0 to {2**32 - 1}, as numpy's generators want it"
        )
    not_negative(
        lr_warmup_iters=training.lr_warmup_iters,
        weight_decay=training.weight_decay,
        clip_grad=training.clip_grad,
        eval_interval=training.eval_interval,
        eval_iters=training.eval_iters,
        sgd_momentum=training.sgd_momentum,
    )
    _below_one(adam_beta1=training.adam_beta1, adam_beta2=training.adam_beta2)
    _schedule(training)
    if training.bf16 and training.fp16:
        raise UserError("--bf16 and --fp16 are both given: choose one")


def _schedule(training: TrainingConfig) -> None:
    """Of the learning rate."""
    if not 0.0 <= training.min_lr <= training.lr:
        raise UserError(f"--min-lr {training.min_lr} is not between 0 and --lr {training.lr}")
    if training.lr_warmup_fraction is not None:
        if training.lr_warmup_iters:
            raise UserError(
                f"--lr-warmup-iters {training.lr_warmup_iters} and --lr-warmup-fraction "
                f"{training.lr_warmup_fraction} are both given: use one"
            )
        _below_one(lr_warmup_fraction=training.lr_warmup_fraction)
    decay = training.lr_decay_iters or training.train_iters
    if training.lr_warmup_iters >= decay:
        raise UserError(
            f"--lr-warmup-iters {training.lr_warmup_iters} is not smaller than the {decay} steps of the schedule"
        )


def _data(config: Config) -> None:
    data = config.data
    if not data.data_path:
        raise UserError("--data-path is empty: give the prefix of a .bin/.idx pair")
    if data.tokenizer_type == "HuggingFaceTokenizer" and data.tokenizer_model is None:
        raise UserError(
            "--tokenizer-type HuggingFaceTokenizer needs --tokenizer-model PATH of a tokenizer.json"
        )
    if data.tokenizer_type not in ("auto", "bytes", "HuggingFaceTokenizer"):
        raise UserError(
            f"--tokenizer-type {data.tokenizer_type!r} is not known: use auto, bytes or HuggingFaceTokenizer"
        )


def _run_directory(config: Config) -> None:
    save, interval, shapley = config.checkpoint.save, config.checkpoint.save_interval, config.shapley
    if save is None and interval:
        raise UserError(f"--save-interval {interval} needs --save DIRECTORY")
    not_negative(save_interval=interval)
    positive(save_retain_interval=config.checkpoint.save_retain_interval)
    for flag, directory in (("--save", save), ("--shapley-dir", shapley.dir if shapley.enabled else None)):
        if directory is not None:
            _can_be_directory(flag, Path(directory))


def _scoring(config: Config) -> None:
    shapley = config.shapley
    if not shapley.enabled:
        return
    if shapley.refresh > 1 and shapley.estimator != "first_order":
        raise UserError(
            f"--shapley-refresh {shapley.refresh} with --shapley-estimator {shapley.estimator}: a direction integrated "
            f"along one step's own path says nothing of another step; use first_order or leave --shapley-refresh out"
        )
    if not shapley.target:
        raise UserError(
            "no --shapley-target is given: name a validation set as NAME=PATH[:SEQUENCES], or train without scoring "
            "with --no-shapley"
        )
    if config.checkpoint.save is None and shapley.dir is None:
        raise UserError(
            "scoring needs a place for its ledger: give --save DIRECTORY or --shapley-dir DIRECTORY"
        )


def _can_be_directory(flag: str, directory: Path) -> None:
    there = next((path for path in (directory, *directory.parents) if path.exists()), directory)
    if there.exists() and not there.is_dir():
        raise UserError(f"{flag} {directory}: {there} is a file, not a directory; choose another place")
