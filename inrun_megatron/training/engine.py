"""Model, optimizer and DeepSpeed engine of one rank."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from megatron.core import parallel_state
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from inrun_megatron.config import Config
from inrun_megatron.engines.balancing import ExpertBiases, scale_balancing_losses
from inrun_megatron.engines.gradients import (
    keep_fp32_norm,
    mark_tensor_parallel_gradients,
    sum_partial_gradients,
)
from inrun_megatron.engines.pipeline import unpartitioned
from inrun_megatron.engines.unfused import forget_first_step
from inrun_megatron.models import GPT, build_gpt, cpu
from inrun_megatron.models.pipeline import GPTPipeline, build_pipeline
from inrun_megatron.models.recompute import Wrap, enable_recompute
from inrun_megatron.training.deepspeed_config import Batch
from inrun_megatron.training.distributed import Mpu, limit_waits
from inrun_megatron.training.optimizer import build_optimizer, build_schedule

MONITOR_SECTIONS = ("tensorboard", "csv_monitor", "wandb", "comet")


@dataclass
class Trainer:
    """What the loop drives: `engine` (DeepSpeed), its `optimizer`, the `schedule` of learning rate and decay, and the biases by
    which experts are chosen."""

    engine: Any
    optimizer: torch.optim.Optimizer
    schedule: OptimizerParamScheduler
    device: torch.device
    biases: ExpertBiases

    @property
    def model(self) -> GPT | GPTPipeline:
        """The module inside the engine: the model, or this stage of it."""
        return self.engine.module

    def recompute(self, num_layers: int, wrap: Wrap | None = None) -> None:
        """Keep only the input of every `num_layers` layers; wrap: see models/recompute.py."""
        arguments = {} if wrap is None else {"wrap": wrap}
        model = self.model
        if isinstance(model, GPTPipeline):
            model.recompute(**arguments)
        else:
            enable_recompute(model.decoder, num_layers, **arguments)


def build_trainer(config: Config, deepspeed_config: dict[str, Any], batch: Batch, vocab_size: int) -> Trainer:
    """Collective over all ranks. Process groups must be initialised (training/distributed.py)."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    cpu.install()
    seed_streams(config.training.seed)
    # Monitors are ours (training/monitor.py): the engine would write a second set of figures.
    engine_config = {key: value for key, value in deepspeed_config.items() if key not in MONITOR_SECTIONS}
    pipeline = config.parallel.pipeline_model_parallel_size > 1
    if pipeline and config.parallel.sequence_parallel:
        engine_config = unpartitioned(engine_config)
    if pipeline:
        model: GPT | GPTPipeline = _build_pipeline(config, vocab_size)
    else:
        model = _build_model(config, engine_config, vocab_size)
    optimizer = build_optimizer(model, config.training, engine_config)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=engine_config,
        mpu=None if pipeline else Mpu(),  # a PipelineModule brings its own
        dist_init_required=False,
    )
    limit_waits(config.parallel)
    keep_fp32_norm(engine)
    scale_balancing_losses(engine)
    sum_partial_gradients(engine.module, parallel_state.get_tensor_model_parallel_group())
    if type(engine.optimizer).__name__ == "FP16_UnfusedOptimizer":
        mark_tensor_parallel_gradients(engine.module)
        forget_first_step(engine.optimizer)
    # Built after the engine, which may replace the optimizer's parameter groups.
    schedule = build_schedule(optimizer, config.training, batch.size)
    biases = ExpertBiases(engine.module, engine.module.gpt_name if pipeline else str)
    return Trainer(engine, optimizer, schedule, torch.device(engine.device), biases)


def seed_streams(seed: int) -> None:
    """Seed every RNG stream of this rank."""
    cpu.seed_everything(
        seed,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
    )


def _build_model(config: Config, deepspeed_config: dict[str, Any], vocab_size: int) -> GPT:
    arguments: dict[str, Any] = {}
    if config.parallel.zero_stage == 3:
        # Every parameter is partitioned as soon as its module is built: no rank ever holds the whole model.
        # The group must be named: by default zero.Init partitions over the world, tensor-parallel ranks included.
        arguments["construction"] = deepspeed.zero.Init(
            data_parallel_group=parallel_state.get_data_parallel_group(),
            config_dict_or_path=deepspeed_config,
            mpu=Mpu(),
        )
        arguments["gather"] = lambda parameter: deepspeed.zero.GatheredParameters(
            [parameter], modifier_rank=0
        )
    model = build_gpt(
        config.model,
        vocab_size=vocab_size,
        seq_length=config.data.seq_length,
        seed=config.training.seed,
        sequence_parallel=config.parallel.sequence_parallel,
        **arguments,
    )
    if config.parallel.zero_stage == 3 and model.share_embeddings_and_output_weights:
        # The output layer uses the embedding's weight, which belongs to another module: gather it there too.
        deepspeed.zero.register_external_parameter(model.output_layer, model.embedding.word_embeddings.weight)
    return model


def _build_pipeline(config: Config, vocab_size: int) -> GPTPipeline:
    return build_pipeline(
        config.model,
        vocab_size=vocab_size,
        seq_length=config.data.seq_length,
        seed=config.training.seed,
        sequence_parallel=config.parallel.sequence_parallel,
    )
