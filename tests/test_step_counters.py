"""Steps of the optimizer counted on the host, against the counters that it keeps itself."""

from __future__ import annotations

import copy
import tempfile
import traceback
from typing import Any

import pytest
import torch

from inrun_megatron.engines.inner import coming_step, set_steps
from inrun_megatron.engines.step_counters import StepCounters
from tests.counting import HostReads, HostWaits
from tests.distributed import assert_cases, run_cases
from tests.layout_engine import build_engine, forward_backward, share
from tests.layouts import LayoutCase

N = 6
KINDS: dict[str, dict[str, Any]] = {"fused": {"fused": True}, "foreach": {"foreach": True}, "loop": {}}


class Plain(torch.optim.Optimizer):
    """Counts as a kernel might: a step moves the version of its counter by ``writes``."""

    def __init__(self, parameters: list[torch.nn.Parameter], writes: int) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.writes = writes

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for tensor in group["params"]:
                if tensor.grad is not None:
                    counter = self.state[tensor].setdefault("step", torch.zeros(()))
                    counter.data.add_(1)
                    for _ in range(self.writes):
                        counter.add_(0)


def _parameters(count: int = 3) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(N, generator=generator)) for _ in range(count)]


def _adamw(**options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(_parameters(), lr=0.01, **(options or {"fused": True}))


def _tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [tensor for group in optimizer.param_groups for tensor in group["params"]]


def _step(optimizer: torch.optim.Optimizer, without: int | None = None) -> None:
    for index, tensor in enumerate(_tensors(optimizer)):
        tensor.grad = None if index == without else torch.ones_like(tensor)
    optimizer.step()


def _counted(optimizer: torch.optim.Optimizer, counters: StepCounters) -> list[int]:
    return [counters.done(t, optimizer.state.get(t, {}).get("step", 0)) for t in _tensors(optimizer)]


def _exact(optimizer: torch.optim.Optimizer) -> list[int]:
    return [int(optimizer.state.get(tensor, {}).get("step", 0)) for tensor in _tensors(optimizer)]


def _reads(optimizer: torch.optim.Optimizer, counters: StepCounters) -> int:
    """How often the host reads for a look at all counters, which must be right."""
    with HostReads() as reads, HostWaits() as waits:
        found = _counted(optimizer, counters)
    assert found == _exact(optimizer)
    assert sum(waits.counts.values()) <= sum(reads.counts.values())
    return sum(reads.counts.values())


@pytest.mark.parametrize("kind", [*KINDS, 0, 1, 3])
def test_a_counter_is_read_once(kind: str | int) -> None:
    """Whatever a step does to its version; tensors without a gradient are not stepped."""
    optimizer = Plain(_parameters(), kind) if isinstance(kind, int) else _adamw(**KINDS[kind])
    counters = StepCounters(optimizer, always=True)
    assert _reads(optimizer, counters) == 0  # no state yet
    for iteration in range(1, 8):
        _step(optimizer, without=iteration % 4)
        # Number 1 has no step in the first iteration.
        assert _reads(optimizer, counters) == {1: 2, 2: 1}.get(iteration, 0), iteration
    assert len(set(_exact(optimizer))) > 1


def test_counters_on_the_cpu_are_read_each_time() -> None:
    optimizer = _adamw()
    counters = StepCounters(optimizer)
    for _ in range(3):
        _step(optimizer)
        assert _reads(optimizer, counters) == 3


def test_the_coming_step_is_numbered_by_them() -> None:
    optimizer = _adamw()
    counters = StepCounters(optimizer, always=True)
    group, tensor = optimizer.param_groups[0], _tensors(optimizer)[0]
    for iteration in range(1, 5):
        with HostReads() as reads:
            step = coming_step(optimizer, group, tensor, counters=counters)
        assert step.t == iteration  # type: ignore[attr-defined]
        assert sum(reads.counts.values()) == (iteration == 2)
        _step(optimizer)


def test_groups_may_be_shown_one_at_a_time() -> None:
    parameters = _parameters()
    optimizer = torch.optim.AdamW([{"params": [p]} for p in parameters], lr=0.01, fused=True)
    counters = StepCounters(optimizer, always=True)
    groups = optimizer.param_groups
    for iteration in range(4):
        for index, group in enumerate(groups):
            if (iteration, index) != (2, 1):
                optimizer.param_groups = [group]
                _step(optimizer)
        optimizer.param_groups = groups
        assert _reads(optimizer, counters) == (0 if iteration else 3)
    assert _exact(optimizer) == [4, 3, 4]


@pytest.mark.parametrize("stepped", [False, True], ids=["then read", "then stepped"])
@pytest.mark.parametrize("rewind", ["in place", "loaded", "loaded with the same count", "replaced", "own"])
def test_a_counter_that_another_hand_moved_is_read_again(rewind: str, stepped: bool) -> None:
    optimizer = _adamw()
    counters = StepCounters(optimizer, always=True)
    _step(optimizer)
    _step(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    for _ in range(3):
        _step(optimizer)
        _counted(optimizer, counters)
    first = optimizer.state[_tensors(optimizer)[0]]
    if rewind == "in place":
        first["step"].fill_(2)
    elif rewind == "replaced":
        first["step"] = torch.tensor(2.0)
    elif rewind == "own":  # nothing moved
        optimizer.load_state_dict(optimizer.state_dict())
    else:
        if rewind == "loaded with the same count":
            saved = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(saved)
    if stepped:
        _step(optimizer)
    again = {"in place": 1, "replaced": 1, "own": 0}.get(rewind, 3)
    assert _reads(optimizer, counters) == again
    _step(optimizer)
    assert _reads(optimizer, counters) == 0


@pytest.mark.parametrize("overflow", [0.0, 1.0])
def test_a_step_that_a_gradient_scaler_may_undo_is_read(overflow: float) -> None:
    optimizer = _adamw()
    counters = StepCounters(optimizer, always=True)
    _step(optimizer)
    _counted(optimizer, counters)
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(overflow), torch.tensor(1.0)  # type: ignore[attr-defined]
    _step(optimizer)
    assert _reads(optimizer, counters) == 3
    assert _exact(optimizer) == [2 - int(overflow)] * 3


def test_nothing_is_left_in_the_optimizer() -> None:
    optimizer = _adamw()
    before = len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)
    counters = StepCounters(optimizer)
    counters.remove()
    assert before == (len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks))


@pytest.mark.parametrize("kind", KINDS)
def test_restored_counters_are_the_tensors_own(kind: str) -> None:
    """A counter in common would count the step of every tensor."""
    optimizer = _adamw(**KINDS[kind])
    states: dict[int, dict[str, Any]] = {
        index: {"exp_avg": torch.zeros(N), "exp_avg_sq": torch.zeros(N)} for index in range(3)
    }
    current = optimizer.state_dict()
    set_steps(optimizer, current["param_groups"], states, {0: 5})
    optimizer.load_state_dict({"state": states, "param_groups": current["param_groups"]})
    _step(optimizer)
    assert _exact(optimizer) == [6, 6, 6]


def test_fused_adam_steps_a_group_by_one_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's, with the kernel's place taken by a list of the steps that it is told; also after they are restored."""
    from deepspeed.ops.adam import fused_adam

    told: list[int] = []

    class Kernel:
        @staticmethod
        def multi_tensor_adam(chunk: int, overflow: Any, lists: Any, *options: Any) -> None:
            told.append(options[4])

    class Builder:
        def load(self) -> type[Kernel]:
            return Kernel

    monkeypatch.setattr(fused_adam, "FusedAdamBuilder", Builder)
    optimizer = fused_adam.FusedAdam(_parameters(), lr=0.01)
    for restored in (False, True):
        if restored:
            current, states = optimizer.state_dict(), {}
            for index in range(3):
                states[index] = {"exp_avg": torch.zeros(N), "exp_avg_sq": torch.zeros(N)}
            set_steps(optimizer, current["param_groups"], states, {0: 5})
            optimizer.load_state_dict({"state": states, "param_groups": current["param_groups"]})
        for _ in range(3):
            group = optimizer.param_groups[0]
            coming = {coming_step(optimizer, group, tensor).t for tensor in _tensors(optimizer)}  # type: ignore[attr-defined]
            _step(optimizer)
            assert coming == {told[-1]}
    assert told == [1, 2, 3, 6, 7, 8]


CASES = [
    LayoutCase(1, 1, False, 0, 1, "gpt2", steps=4),
    LayoutCase(1, 1, False, 0, 1, "gpt2", steps=4, precision="bf16"),
    LayoutCase(1, 1, False, 1, 1, "gpt2", steps=4, precision="bf16", grad_accum_fp32=True),
    LayoutCase(1, 1, False, 2, 1, "gpt2", steps=4),
    LayoutCase(1, 1, False, 2, 1, "gpt2", steps=6, precision="fp16"),
    LayoutCase(1, 1, False, 3, 1, "llama", steps=4),
]


def _of_an_engine(rank: int, world: int, case: LayoutCase) -> dict[str, list[Any]]:
    """Per step: steps taken as counted, as the optimizer says, and reads of the former; a function for `run_cases`."""
    from inrun_megatron import InRunShapley, Layout, ShapleyTarget
    from inrun_megatron.models import token_losses

    engine = build_engine(case)
    layout = Layout.current()
    targets = [
        ShapleyTarget(t.name, share(t, layout, 2, pipeline=False), t.num_tokens) for t in case.targets()
    ]
    shapley = InRunShapley(engine, targets, token_losses, layout=layout)
    preparation, adapter = shapley.preparation, shapley.adapter
    preparation.counters.always = True
    found: dict[str, list[Any]] = {"counted": [], "exact": [], "reads": [], "applied": []}

    def look() -> None:
        pieces = [piece for _, piece in adapter.pieces()]
        with HostReads() as reads:
            found["counted"].append([preparation._step(piece).t - 1 for piece in pieces])  # type: ignore[attr-defined]
        found["exact"].append([int(adapter.inner.state.get(p.tensor, {}).get("step", 0)) for p in pieces])
        found["reads"].append(sum(reads.counts.values()))

    def train(iteration: int) -> None:
        for microbatch in case.batches()[iteration - 1][layout.dp_rank]:
            with step.samples(microbatch["dataset"], microbatch["sample"], microbatch["loss_mask"].sum(1)):
                forward_backward(engine, microbatch)

    with tempfile.TemporaryDirectory() as directory:
        for iteration in range(1, case.steps + 1):
            if case.precision == "fp16":  # an overflow in step 4
                engine.optimizer.loss_scaler.cur_scale = 2.0 ** (60 if iteration == 4 else 10)
            with shapley.step(iteration) as step:
                train(iteration)
            found["applied"].append(adapter.step_applied())
            look()
            if iteration == 2:
                engine.save_checkpoint(directory, tag="2")
        engine.load_checkpoint(directory, tag="2")
        look()
        with shapley.step(3) as step:
            train(3)
        look()
    shapley.close()
    return found


def test_steps_of_deepspeeds_optimizers() -> None:
    """Every stage and precision, steps skipped because of an overflow, and a checkpoint loaded over a longer run."""
    results = assert_cases(run_cases(_of_an_engine, 1, CASES, timeout=300))
    for case, (found,) in zip(CASES, results, strict=True):
        exact, reads, applied = found["exact"], found["reads"], found["applied"]
        print(f"{case}: applied {applied}, steps {[steps[0] for steps in exact]}, reads {reads}")
        assert found["counted"] == exact, case
        loaded = case.steps
        assert exact[loaded] == exact[1] != exact[loaded - 1], case
        # Some wrappers of DeepSpeed take a first step on zeros when they are built.
        assert exact[loaded - 1][0] - exact[0][0] == sum(applied) - 1, case
        assert applied == [case.precision != "fp16" or i != 4 for i in range(1, loaded + 1)], case
        assert reads[loaded] > 0 and {*reads[1:loaded], *reads[loaded + 1 :]} == {0}, case


def _elastic(rank: int, world: int, rigid: bool) -> str:
    """What loading an elastic checkpoint fails with, where they are on or off; a function for `run_cases`."""
    case = LayoutCase(1, 1, False, 2, 1, "gpt2", steps=2)
    engine = build_engine(case)
    for batch in case.batches():
        forward_backward(engine, batch[0][0])
    with tempfile.TemporaryDirectory() as directory:
        engine.optimizer.elastic_checkpoint = True
        engine.save_checkpoint(directory, tag="2")
        engine.optimizer.elastic_checkpoint = not rigid
        try:
            engine.load_checkpoint(directory, tag="2")
        except (AssertionError, KeyError):
            return traceback.format_exc()
    return ""


def test_deepspeed_writes_no_counter_through_data() -> None:
    """Its elastic checkpoints do write states in place, but none of an optimizer that counts in tensors is loaded."""
    for rigid, (text,) in zip(
        (False, True), assert_cases(run_cases(_elastic, 1, [False, True], timeout=300))
    ):
        assert "BASE_OPTIMIZER_STATE_STEP" in text, f"{rigid}: {text}"
        assert "in _restore_base_optimizer_state" not in text, f"{rigid}: {text}"
