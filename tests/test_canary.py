"""Private names of DeepSpeed and megatron-core that the adapters and taps use: fails when one moves.

A patched name that was renamed upstream becomes a silent no-op; here it becomes a red test instead.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import inrun_megatron


def _source(thing: object) -> str:
    return inspect.getsource(thing)  # type: ignore[arg-type]


def test_parallel_linears_multiply_in_forward_impl() -> None:
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    for layer in (ColumnParallelLinear, RowParallelLinear):
        source = _source(layer.forward)
        assert "self._forward_impl(" in source
        for keyword in ("input=", "weight=", "bias=", "allreduce_dgrad=", "sequence_parallel=", "tp_group="):
            assert keyword in source, f"{layer.__name__}._forward_impl is no longer given {keyword}"
        assert "self.skip_bias_add" in source
    # The product must get no bias while skip_bias_add is set: the tap adds it.
    assert "bias = self.bias if not self.skip_bias_add else None" in _source(ColumnParallelLinear.forward)
    assert "bias=None," in _source(RowParallelLinear.forward)


def test_vocabulary_embedding_is_what_the_tap_replaces() -> None:
    from megatron.core.tensor_parallel.layers import VocabParallelEmbedding

    source = _source(VocabParallelEmbedding.forward)
    for name in ("vocab_start_index", "vocab_end_index", "reduce_scatter_embeddings", "tp_group"):
        assert f"self.{name}" in source


def test_experts_lie_as_their_taps_expect() -> None:
    from megatron.core.transformer.moe import experts, moe_layer, moe_utils, router, token_dispatcher

    layer = _source(moe_layer.MoELayer)
    for name in ("self.router", "self.experts", "self.ep_group", "self.attn_tp_group"):
        assert name in layer or name in _source(moe_layer.BaseMoELayer), name
    assert "self.gating(" in _source(router.TopKRouter.forward)
    assert re.search(r"return probs, routing_map", _source(router.TopKRouter.forward))
    assert "self.weight, self.bias, router_dtype)" in _source(router.Router.gating)
    forward = list(inspect.signature(experts.SequentialMLP.forward).parameters)
    assert forward == [
        "self",
        "permuted_local_hidden_states",
        "tokens_per_expert",
        "permuted_probs",
    ], forward
    assert "local_experts" in _source(experts.SequentialMLP)
    # Tokens of an expert in their order: by a transposed mask, expert after expert.
    assert "routing_map.bool().T.contiguous()" in _source(moe_utils.permute)
    assert "self.tp_ep_group" in _source(token_dispatcher.MoEAllGatherTokenDispatcher.token_dispatch)
    # What balances experts has its gradient times this number (engines/balancing.py), and none in evaluation.
    assert "main_loss_backward_scale" in _source(moe_utils.MoEAuxLossAutoScaler.backward)
    assert "self.training and torch.is_grad_enabled()" in _source(router.TopKRouter.routing)
    assert "self.training and torch.is_grad_enabled()" in _source(router.TopKRouter.apply_z_loss)


@pytest.mark.parametrize(
    ("module", "owner", "names"),
    [
        (
            "deepspeed.runtime.zero.stage_1_and_2",
            "DeepSpeedZeroOptimizer",
            ("bit16_groups", "bit16_groups_flat", "single_partition_of_fp32_groups", "clip_grad"),
        ),
        (
            "deepspeed.runtime.zero.stage3",
            "DeepSpeedZeroOptimizer_Stage3",
            (
                "fp16_groups",
                "fp32_partitioned_groups_flat",
                "grad_position",
                "get_param_id",
                "sub_group_to_group_id",
                "_partition_all_parameters",
                "invalidate_secondary_tensor",
                "clip_grad",
                "_set_fp32_optimizer_param_groups",
                "_clear_fp32_optimizer_param_groups",
            ),
        ),
        (
            "deepspeed.runtime.bf16_optimizer",
            "BF16_Optimizer",
            ("bf16_groups", "bf16_groups_flat", "fp32_groups_flat_partition", "clip_grad"),
        ),
        (
            "deepspeed.runtime.fp16.fused_optimizer",
            "FP16_Optimizer",
            ("fp16_groups", "fp16_groups_flat", "fp32_groups_flat", "clip_grad"),
        ),
        (
            "deepspeed.runtime.fp16.unfused_optimizer",
            "FP16_UnfusedOptimizer",
            ("fp16_groups", "fp32_groups", "clip_grad"),
        ),
        (
            "deepspeed.runtime.engine",
            "DeepSpeedEngine",
            (
                "clip_fp32_gradients",
                "get_global_grad_norm",
                "_global_grad_norm",
                "was_step_applied",
                "gradient_clipping",
                "zero_offload_param",
                "zero_offload_optimizer",
                "torch_autocast_enabled",
                "self.sequence_parallel_size = ",
                "self.dp_world_size = ",
                "self.gradient_average = ",
                "gradient_predivide_factor",
                "postscale_gradients",
                "zero_hpz_partition_size",
                "global_steps",
                "skipped_steps",
                "global_samples",
                "save_zero_checkpoint",
                "_get_ckpt_name",
                "_get_zero_ckpt_name",
            ),
        ),
        ("deepspeed.runtime.pipe.module", "PipelineModule", ("forward_funcs", "ckpt_layer_path")),
        (
            "deepspeed.runtime.fp16.loss_scaler",
            "DynamicLossScaler",
            ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis", "scale_window", "scale_factor"),
        ),
    ],
)
def test_deepspeed_names(module: str, owner: str, names: tuple[str, ...]) -> None:
    import importlib

    loaded = importlib.import_module(module)
    source = _source(getattr(loaded, owner))
    for name in names:
        assert name in source, f"{owner} has no {name} any more: engines/zero*.py read it"


def test_what_is_not_public_is_touched_in_the_adapters_alone() -> None:
    """Private names of an engine or of its optimizer, and DeepSpeed's modules beside the public ones."""
    package = Path(inrun_megatron.__file__).parent
    private = re.compile(r"\b(?:engine|optimizer|wrapper)\._(?!_)\w+")
    found = {
        f"{path.relative_to(package)}: {name}"
        for path in package.rglob("*.py")
        if path.parent.name != "engines"
        for name in private.findall(path.read_text())
    }
    assert not found


def test_partitioned_parameters_still_know_their_whole_shape() -> None:
    """Read where parameters are: taps/attach.py, directions/vectors.py, training/optimizer.py."""
    from deepspeed.runtime.zero import partition_parameters

    source = _source(partition_parameters)
    assert "param.ds_shape = param.shape" in source and "param.ds_numel = param.numel()" in source


def test_zero_3_fetches_in_a_stream_that_the_lookahead_makes_wait() -> None:
    """It is made to wait for written shards (zero_groups.py: forget_gathered_weights), as DeepSpeed leaves it to its step."""
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    from inrun_megatron.engines.zero_groups import _FETCHES

    owner, own = _FETCHES.removeprefix("_").split("__")
    source = _source(DeepSpeedZeRoOffload)
    assert owner == DeepSpeedZeRoOffload.__name__
    assert f"self.__{own} = None if get_accelerator().is_synchronized_device()" in source
    assert f"allgather_stream=self.__{own}," in source
    fetch = _source(PartitionedParameterCoordinator)
    assert "with get_accelerator().stream(self.__allgather_stream):" in fetch


def test_checkpoints_hold_what_a_resume_in_another_layout_reads() -> None:
    """Whole files of every kind are read in tests/test_reshape.py, all but those of the fp16 optimizers at stage 0."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    inner = "self.optimizer.state_dict()"
    for kind in (DeepSpeedZeroOptimizer, BF16_Optimizer):
        source = _source(kind.state_dict)
        assert f"[BASE_OPTIMIZER_STATE] = {inner}" in source and "SINGLE_PARTITION_OF_FP32_GROUPS" in source
    source = _source(DeepSpeedZeroOptimizer_Stage3._rigid_state_dict)
    assert f"[OPTIMIZER_STATE_DICT] = {inner}" in source and "FP32_FLAT_GROUPS" in source
    for kind, name in ((FP16_Optimizer, "fp32_groups_flat"), (FP16_UnfusedOptimizer, "fp32_groups")):
        source = _source(kind.state_dict)
        assert f"[OPTIMIZER_STATE_DICT] = {inner}" in source and f"['{name}'] = self.{name}" in source


def test_fp32_clipping_at_stage_0_is_what_the_adapter_replaces() -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine

    assert "self.clip_fp32_gradients()" in _source(DeepSpeedEngine._take_model_step)
    assert "clip_grad_norm_(parameters=self.module.parameters()" in _source(
        DeepSpeedEngine.clip_fp32_gradients
    )


def test_fp16_at_stage_0_is_still_refused_for_a_reason() -> None:
    """engine.backward() scales the loss for ZeRO optimizers only; when that changes, lift the refusal."""
    from deepspeed.runtime.base_optimizer import ZeROOptimizer
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    source = _source(inspect.getmodule(DeepSpeedEngine))
    start = source.index("loss = loss / self.gradient_accumulation_steps() if scale_wrt_gas else loss")
    scaling = source[start : source.index("if loss.requires_grad:", start)]
    assert "if isinstance(self.optimizer, ZeROOptimizer):" in scaling and "scale_if_loss" in scaling
    assert not issubclass(FP16_Optimizer, ZeROOptimizer)
    assert not issubclass(FP16_UnfusedOptimizer, ZeROOptimizer)


def test_the_unfused_optimizer_still_steps_when_it_is_built() -> None:
    """When it no longer does, engines/unfused.py can go; it needs no more of it than these lists and the inner optimizer."""
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    assert "self.initialize_optimizer_states()" in _source(FP16_UnfusedOptimizer.__init__)
    assert "self.optimizer.step()" in _source(FP16_UnfusedOptimizer.initialize_optimizer_states)


def test_inner_optimizers_run_public_step_hooks() -> None:
    """The additivity audit reads gradients in torch's public hook; DeepSpeed's optimizers must run it too."""
    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    for kind in (FusedAdam, DeepSpeedCPUAdam):
        assert issubclass(kind, torch.optim.Optimizer)
    assert "step" in _source(FusedAdam) and "adam_w_mode" in _source(FusedAdam)
    assert "adam_w_mode" in _source(DeepSpeedCPUAdam)


def test_pipeline_engine_runs_the_map_and_the_schedule_that_the_adapter_replaces() -> None:
    from deepspeed.runtime.pipe.engine import PipelineEngine
    from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass, SendGrad, TrainSchedule

    assert {ForwardPass, BackwardPass, SendGrad} <= set(PipelineEngine._INSTRUCTION_MAP)
    assert "MethodType(self._INSTRUCTION_MAP[type(cmd)], self)" in _source(PipelineEngine._exec_schedule)
    assert "sched = self._train_schedule()" in _source(PipelineEngine.train_batch)
    assert "micro_batches=self.micro_batches, stages=self.num_stages, stage_id=self.stage_id" in _source(
        PipelineEngine._train_schedule
    )
    assert list(inspect.signature(TrainSchedule.__init__).parameters)[1:] == [
        "micro_batches",
        "stages",
        "stage_id",
    ]
    forward = _source(PipelineEngine._exec_forward_pass)
    assert "self.loss = self.module.loss_fn(outputs, labels)" in forward
    assert "self.total_loss = add_to_total_loss(self.total_loss, self.loss)" in forward
    # Once per microbatch, on the last stage only: the validation loss is multiplied by it beforehand.
    assert "if self.is_last_stage():" in _source(PipelineEngine._backward_prologue_per_tensor)
    for name in ("set_dataiterator", "is_pipe_partitioned", "is_grad_partitioned"):
        assert name in _source(PipelineEngine)
    for state in ("self.total_loss = None", "self._compute_loss = True", "self._exec_schedule(sched)"):
        assert state in _source(PipelineEngine.train_batch)  # run_detached does the same for a run of its own
    assert "if self._compute_loss" in forward
    evaluation = _source(PipelineEngine.eval_batch)
    assert "if compute_loss and (bcast_loss or self.monitor.enabled)" in evaluation
    assert "if reduce is None:" in _source(PipelineEngine._reduce_outputs)


def test_zero_1_still_sums_the_norm_of_each_group_over_the_stages() -> None:
    """Else stages may have parameter groups of other numbers."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    assert "for i, group in enumerate(self.bit16_groups)" in _source(
        DeepSpeedZeroOptimizer.scaled_global_norm
    )
    assert "_model_parallel_all_reduce" in _source(DeepSpeedZeroOptimizer.get_grad_norm_direct)


def test_a_schedule_ends_with_the_three_instructions_that_detached_runs_leave_out() -> None:
    from deepspeed.runtime.pipe.schedule import OptimizerStep, ReduceGrads, ReduceTiedGrads, TrainSchedule

    for stage in (0, 1):
        *_, last = TrainSchedule(micro_batches=3, stages=2, stage_id=stage)
        assert [type(command) for command in last[-3:]] == [ReduceTiedGrads, ReduceGrads, OptimizerStep]


def test_a_stage_runs_microbatches_in_order_forwards_and_backwards() -> None:
    """The adapter counts instructions to know which microbatch a stage holds."""
    from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass, TrainSchedule

    for stages in (2, 3, 4):
        for stage in range(stages):
            schedule = TrainSchedule(micro_batches=7, stages=stages, stage_id=stage)
            for kind in (ForwardPass, BackwardPass):
                buffers = [c.buffer_id for step in schedule for c in step if type(c) is kind]
                assert buffers == [m % schedule.num_pipe_buffers() for m in range(7)]


def test_the_stream_without_a_flush_waits_for_half_as_many_half_steps() -> None:
    """The figures of docs/pipeline.md, counted on DeepSpeed's own schedule (benchmarks/schedule.py).

    A stage's first training backward needs the last validation backward of all stages. Waiting for it costs the last
    stage, and the step, P - 2 half-steps; a flush costs 2 (P - 1).
    """
    from benchmarks.schedule import timeline

    for stages in (2, 3, 4, 8):
        for validation, training in ((1, 8), (3, 8), (4, 16)):
            ideal = 2 * (validation + training + stages - 1)
            nothing, in_front, flushed = (
                timeline(validation, training, stages, flush=flush, crosses=crosses)
                for flush, crosses in ((False, False), (False, True), (True, True))
            )
            assert nothing.length == ideal and sum(nothing.waits) == 0
            assert in_front.length == ideal + stages - 2
            assert in_front.waits == [0] * (stages - 1) + [stages - 2]
            assert flushed.length == ideal + 2 * (stages - 1) and sum(flushed.waits) == 0


def test_pipeline_module_marks_and_ties_what_the_directions_read() -> None:
    from deepspeed.runtime.pipe.module import PipelineModule

    assert "p.ds_pipe_replicated = True" in _source(PipelineModule._index_tied_modules)
    assert "self.global_rank != tied_ranks[0]" in _source(PipelineModule._index_tied_modules)
    assert "weight_group_list.append((weight, comm['group']))" in _source(
        PipelineModule.get_tied_weights_and_groups
    )


def test_fp32_clipping_under_a_pipeline_still_needs_ours() -> None:
    """clip_grad_norm_ counts replicated parameters on one rank of all stages; when that changes, drop ours."""
    from deepspeed.runtime.utils import clip_grad_norm_

    source = _source(clip_grad_norm_)
    assert "(mpu.get_model_parallel_rank() == 0) or is_model_parallel_parameter(p)" in source
    assert "ds_pipe_replicated" not in source and "PIPE_REPLICATED" not in source
