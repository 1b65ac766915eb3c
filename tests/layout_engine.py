"""The real DeepSpeed engine of a layout case, its weights the oracle's, and one step of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.layouts import SEQUENCE, VOCABULARY, LayoutCase
from tests.oracle import OracleTarget
from tests.oracle_gpt import with_padded_vocab
from tests.oracle_shards import split_parameters


def _optimizer(case: LayoutCase, model: torch.nn.Module) -> torch.optim.Optimizer:
    spec = case.spec()
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim > 1]
    rest = [p for p in trained if p.ndim == 1]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": spec.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if spec.kind == "sgd":
        return torch.optim.SGD(groups, lr=case.lr, momentum=spec.momentum, nesterov=spec.nesterov)
    kind = torch.optim.AdamW if spec.kind == "adamw" else torch.optim.Adam
    return kind(groups, lr=case.lr, betas=(spec.beta1, spec.beta2), eps=spec.eps)


def _configuration(case: LayoutCase) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": case.micro_batch,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": case.spec().clip,
        # Stage 3 lets go of a layer as soon as it is done: its defaults would keep a model this small gathered.
        "zero_optimization": {
            "stage": case.zero,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 0,
            "zero_hpz_partition_size": case.second_copy,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if case.precision == "bf16":
        config["bf16"] = {"enabled": True}
    if case.precision == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": case.scale_power}
    if case.grad_accum_fp32:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if case.pp > 1 and case.sp:
        from inrun_megatron.engines.pipeline import unpartitioned

        config = unpartitioned(config)
    return config


def build_engine(case: LayoutCase) -> Any:
    """The engine of this rank, its weights those of the oracle."""
    import deepspeed
    from megatron.core import parallel_state

    from inrun_megatron.engines.balancing import scale_balancing_losses
    from inrun_megatron.engines.gradients import keep_fp32_norm, sum_partial_gradients
    from inrun_megatron.models import build_gpt, cpu
    from inrun_megatron.models.pipeline import build_pipeline
    from inrun_megatron.training.distributed import Mpu

    if case.precision == "fp16":
        # DeepSpeed refuses fp16 on CPUs without native fp16; torch computes in it all the same.
        from deepspeed.accelerator import get_accelerator

        get_accelerator().is_fp16_supported = lambda: True
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    parallel_state.initialize_model_parallel(case.tp, case.pp)
    cpu.install()
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    cpu.seed_everything(1, tp_rank=tp_rank, dp_rank=parallel_state.get_data_parallel_rank())
    shape = case.model()
    model = (build_gpt if case.pp == 1 else build_pipeline)(
        case.config(),
        vocab_size=VOCABULARY,
        seq_length=SEQUENCE,
        seed=1,
        sequence_parallel=case.sp,
    )
    padded = -(-VOCABULARY // case.tp) * case.tp
    full = with_padded_vocab(case.parameters(), VOCABULARY, padded)
    shard = split_parameters(full, shape, case.tp, tp_rank)
    named = named_parameters(model)
    if case.pp == 1:
        assert named.keys() == shard.keys(), set(named) ^ set(shard)
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(shard[name])
            parameter.requires_grad_(not name.startswith(case.frozen))
    engine = deepspeed.initialize(
        model=model,
        optimizer=_optimizer(case, model),
        config=_configuration(case),
        mpu=Mpu() if case.pp == 1 else None,
    )[0]
    keep_fp32_norm(engine)
    scale_balancing_losses(engine)
    sum_partial_gradients(engine.module, parallel_state.get_tensor_model_parallel_group())
    if case.zero == 3 and shape.is_tied:
        deepspeed.zero.register_external_parameter(
            engine.module.output_layer, engine.module.embedding.word_embeddings.weight
        )
    return engine


def named_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Parameters by GPTModel's names, also those of a pipeline stage."""
    gpt_name = getattr(model, "gpt_name", lambda name: name)
    return {gpt_name(name): parameter for name, parameter in model.named_parameters()}


def share(target: OracleTarget, layout: Any, size: int, *, pipeline: bool) -> list[dict[str, Tensor]]:
    """The microbatches that a run would give this rank (data/targets.py)."""
    from inrun_megatron.data.targets import Target

    rows = target.rows
    tokens = torch.cat([rows["tokens"], rows["labels"][:, -1:]], dim=1)
    documents = rows.get("documents")
    sequences = Target(target.name, tokens, rows["loss_mask"], rows["position_ids"], {}, documents=documents)
    return sequences.microbatches(size, layout.dp_rank, layout.dp_size, full_size=pipeline)


def forward_backward(engine: Any, microbatch: dict[str, Tensor]) -> None:
    from inrun_megatron.models import token_losses

    losses, mask = token_losses(engine, microbatch), microbatch["loss_mask"]
    engine.backward((losses * mask).sum() / mask.sum())
    engine.step()
