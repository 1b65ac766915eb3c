"""DeepSpeed's 1F1B schedule with further microbatches in front of the training ones.

    stage 0     F0 F1 B0 F2 B1 F3 B2 ...        microbatches 0 ... V-1 are validation, the others train
    stage 1        F0 B0 F1 B1 F2 B2 ...

Every stage runs forwards in the order of the microbatches, and backwards too: counting them tells a stage which
microbatch it holds, and after backward V-1 no more validation comes.

Everything of DeepSpeed's PipelineEngine that is not public is touched in this file only; ``tests/test_canary.py`` fails
when one of these names moves. Upstream (deepspeed 0.19): runtime/pipe/engine.py, runtime/pipe/schedule.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from ..errors import UserError
from .evaluating import evaluating

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.engine import PipelineEngine
    from deepspeed.runtime.pipe.schedule import TrainSchedule


class Stream(Protocol):
    """What happens around the forwards and backwards of one ``train_batch`` on this stage."""

    prepended: int

    def forward(self, index: int) -> AbstractContextManager[None]:
        """Around the forward of microbatch ``index``; the prepended ones come first."""
        ...

    def backward(self, index: int) -> AbstractContextManager[None]:
        """Around its backward."""
        ...

    def sent(self) -> None:
        """The gradient of the last backward has been sent to the stage before."""
        ...


class StageLoss(Protocol):
    """How microbatches enter a pipeline and what its last stage makes of them (models/stages.py: PipelineLoss)."""

    def split(self, microbatch: Mapping[str, Tensor]) -> tuple[Any, Any]:
        """(inputs of the first stage, labels for the last one)."""
        ...

    def token_losses(self, outputs: Any, labels: Any) -> Tensor:
        """Losses per token ``[b, s]``, neither masked nor reduced."""
        ...


def unpartitioned(config: dict[str, Any]) -> dict[str, Any]:
    """A DeepSpeed configuration whose pipeline sends each rank's own tensors, as sequence parallelism needs.

    By default PipelineEngine splits what stages exchange over the tensor-parallel ranks and puts it together again,
    which is right only where all of them hold the same. Sequence shards would be mixed up silently.

    Raises:
        UserError: the configuration asks for the split.
    """
    section = dict(config.get("pipeline") or {})
    for key in ("pipe_partitioned", "grad_partitioned"):
        if section.get(key):
            raise UserError(
                f'"pipeline.{key}" is true in the DeepSpeed configuration, but with sequence parallelism every rank '
                f"sends other tokens: remove it or leave --sequence-parallel out"
            )
        section[key] = False
    return {**config, "pipeline": section}


class PipelineAdapter:
    """Lets a ``Stream`` watch a PipelineEngine's ``train_batch`` and put microbatches in front of it."""

    def __init__(self, engine: PipelineEngine) -> None:
        # Here, so that the package can be imported (by the command line, say) without DeepSpeed's seconds.
        from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass, SendGrad

        sharded = any(getattr(p, "sequence_parallel", False) for p in engine.module.parameters())
        if sharded and (engine.is_pipe_partitioned or engine.is_grad_partitioned):
            raise UserError(
                "the pipeline partitions what its stages exchange, which mixes up sequence shards; pass the DeepSpeed "
                "configuration through inrun_megatron.engines.pipeline.unpartitioned"
            )
        _require_equal_groups(engine)
        self.engine = engine
        self._stream: Stream | None = None
        self._forwards = self._backwards = 0
        # The map binds functions when the class is created: replacing the methods would do nothing.
        original: dict[type, Callable[..., None]] = dict(engine._INSTRUCTION_MAP)
        self._run_forward = original[ForwardPass]
        self._run_backward = original[BackwardPass]
        self._run_send = original[SendGrad]
        engine._INSTRUCTION_MAP = {
            **original,
            ForwardPass: self._forward,
            BackwardPass: self._backward,
            SendGrad: self._send,
        }
        engine._train_schedule = self._train_schedule

    def remove(self) -> None:
        """Give the engine its own instructions and schedule back."""
        del self.engine._INSTRUCTION_MAP, self.engine._train_schedule

    def train_batch(
        self,
        stream: Stream | None,
        microbatches: Sequence[tuple[Any, Any]],
        prepended: Sequence[tuple[Any, Any]],
    ) -> Tensor:
        """``engine.train_batch`` over (inputs, labels) pairs; returns the mean training loss."""
        expected = int(self.engine.gradient_accumulation_steps())
        if len(microbatches) != expected:
            raise UserError(
                f"a step was given {len(microbatches)} microbatches, but the engine accumulates {expected}"
            )
        self._stream = stream
        self._forwards = self._backwards = 0
        try:
            loss = train_batch(self.engine, [*prepended, *microbatches])
        finally:
            self._stream = None
            self.engine.set_dataiterator(None)
        return loss

    def run_detached(self, stream: Stream, microbatches: Sequence[tuple[Any, Any]]) -> None:
        """Forwards and backwards of (inputs, labels) pairs in 1F1B, without reductions and without a step."""
        engine = self.engine
        self._stream = stream
        self._forwards = self._backwards = 0
        _announce(engine, microbatches)
        engine.set_dataiterator(iter(microbatches))
        engine.total_loss = None
        engine._compute_loss = True
        try:
            engine._exec_schedule(_detached_schedule(engine, len(microbatches)))
        finally:
            self._stream = None
            engine.total_loss = None
            engine.set_dataiterator(None)

    def _train_schedule(self) -> TrainSchedule:
        from deepspeed.runtime.pipe.schedule import TrainSchedule

        engine = self.engine
        extra = 0 if self._stream is None else self._stream.prepended
        return TrainSchedule(
            micro_batches=engine.micro_batches + extra, stages=engine.num_stages, stage_id=engine.stage_id
        )

    def _forward(self, engine: PipelineEngine, **instruction: Any) -> None:
        stream, index = self._stream, self._forwards
        self._forwards += 1
        if stream is None:
            self._run_forward(engine, **instruction)
            return
        with stream.forward(index):
            self._run_forward(engine, **instruction)

    def _backward(self, engine: PipelineEngine, **instruction: Any) -> None:
        stream, index = self._stream, self._backwards
        self._backwards += 1
        if stream is None:
            self._run_backward(engine, **instruction)
            return
        with stream.backward(index):
            self._run_backward(engine, **instruction)

    def _send(self, engine: PipelineEngine, **instruction: Any) -> None:
        self._run_send(engine, **instruction)
        if self._stream is not None:
            self._stream.sent()

    @contextmanager
    def detached_forward(
        self, loss: Callable[[Any, Any], Tensor], *, training: bool = False
    ) -> Iterator[None]:
        """A forward whose loss (on the last stage) is ``loss(outputs, labels)``; dropout off unless ``training``.

        The loss is taken times the accumulation steps, by which the engine divides every loss, and stays out of the
        engine's sum of training losses.
        """
        engine, module = self.engine, self.engine.module
        own, total = module.loss_fn, engine.total_loss
        steps = int(engine.gradient_accumulation_steps())
        module.loss_fn = lambda outputs, labels: loss(outputs, labels) * steps
        try:
            with nullcontext() if training else evaluating(module):
                yield
        finally:
            module.loss_fn, engine.total_loss = own, total

    def detached_backward(self, *, training: bool = False) -> AbstractContextManager[None]:
        """Around the backward of a ``detached_forward``, in which a checkpoint of DeepSpeed's may run the forward again."""
        return nullcontext() if training else evaluating(self.engine.module)

    def tied(self) -> list[tuple[Parameter, dist.ProcessGroup]]:
        """Trainable weights of this stage that another stage holds too, and the group of their replicas."""
        held = self.engine.module.get_tied_weights_and_groups()
        return [(weight, group) for weight, group in held if weight.requires_grad]


def _require_equal_groups(engine: PipelineEngine) -> None:
    """Raise UserError where stages would wait for each other: ZeRO-1 sums the norm of each parameter group over the stages.

    On all ranks of a replica, before the first step hangs.
    """
    if type(engine.optimizer).__name__ != "DeepSpeedZeroOptimizer":
        return
    own = len(engine.optimizer.param_groups)
    counts = torch.tensor([own, -own], device=engine.device)
    dist.all_reduce(counts, op=dist.ReduceOp.MAX, group=engine.mpu.get_model_parallel_group())
    most, least = counts[0].item(), -counts[1].item()
    if most != least:
        raise UserError(
            f"the optimizer has {least} parameter groups on one pipeline stage and {most} on another: DeepSpeed's ZeRO stage 1 "
            f"sums each group's norm over the stages and would wait forever; give all stages the same groups, or use stage 0"
        )


def _detached_schedule(engine: PipelineEngine, microbatches: int) -> TrainSchedule:
    """1F1B over ``microbatches`` without the instructions of the optimizer step."""
    from deepspeed.runtime.pipe.schedule import OptimizerStep, ReduceGrads, ReduceTiedGrads, TrainSchedule

    class DetachedSchedule(TrainSchedule):
        def steps(self) -> Iterator[list[Any]]:
            for instructions in super().steps():
                yield [
                    i
                    for i in instructions
                    if not isinstance(i, ReduceTiedGrads | ReduceGrads | OptimizerStep)
                ]

    return DetachedSchedule(micro_batches=microbatches, stages=engine.num_stages, stage_id=engine.stage_id)


def train_batch(engine: PipelineEngine, microbatches: Sequence[tuple[Any, Any]]) -> Tensor:
    """``engine.train_batch`` over (inputs, labels) pairs; every stage's module is told all inputs."""
    _announce(engine, microbatches)
    loss: Tensor = engine.train_batch(data_iter=iter(microbatches))
    return loss


def _announce(engine: PipelineEngine, microbatches: Sequence[tuple[Any, Any]]) -> None:
    """A module with ``expect`` needs more of a microbatch than the stage before sends it."""
    expect = getattr(engine.module, "expect", None)
    if expect is not None:
        expect([inputs for inputs, _ in microbatches])


def loss_sums(
    engine: PipelineEngine, loss: StageLoss, microbatches: Sequence[Mapping[str, Tensor]]
) -> Tensor:
    """(sum of the token losses where ``loss_mask`` is 1, loss tokens), fp64 ``[2]``: of this replica, dropout off, no gradients.

    Zeros on all stages but the last.
    """
    module, coming = engine.module, iter(microbatches)  # the last stage sees them in order

    def sums(outputs: Any, labels: Any) -> Tensor:
        losses = loss.token_losses(outputs, labels).double()
        mask = next(coming)["loss_mask"].to(losses)
        return torch.stack([(losses * mask).sum(), mask.sum()])

    pairs = [loss.split(microbatch) for microbatch in microbatches]
    own, module.loss_fn = module.loss_fn, sums
    _announce(engine, pairs)
    engine.total_loss = None  # of the training losses; train_batch starts it anew
    try:
        with evaluating(module):
            found = engine.eval_batch(
                iter(pairs), reduce_output=None, bcast_loss=False, num_micro_batches=len(pairs)
            )
    finally:
        module.loss_fn = own
    if not engine.is_last_stage():
        return torch.zeros(2, dtype=torch.float64, device=engine.device)
    return torch.stack(found).sum(0)
