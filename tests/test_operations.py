"""How many operations a scored step starts beside a plain one: where layers are small, a GPU waits for the host that starts them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest

from tests.counting import Operations
from tests.distributed import assert_cases, run_cases
from tests.layout_engine import build_engine, forward_backward, share
from tests.layouts import LayoutCase


@dataclass(frozen=True)
class Case:
    layout: LayoutCase
    scoring: bool = True
    kernels: bool = False  # Triton's, as on a GPU


SMALL = LayoutCase(1, 1, False, 2, 1, "gpt2", precision="bf16", micro_batch=1, steps=2)
# By rows of a microbatch, and whether kernels serve it: operations of a layer (four linear layers, as many biases, two norms).
BEYOND_PLAIN = {
    (
        1,
        False,
    ): 16,  # a cast and a dot of a linear layer's gradient, copies of the gradients of biases, scales and shifts
    (1, True): 10,  # a linear layer's kernel, a copy of a bias's gradient, a norm's kernel
    (2, True): 10,  # of four more for the rows of biases four are saved: a kernel that is dots and product
}


@contextmanager
def _as_on_a_gpu(operations: Operations) -> Iterator[None]:
    """Kernels take what they would take on a GPU; each counts as one operation, whatever its interpreter does."""
    from triton.runtime.interpreter import GridExecutor

    from inrun_megatron.dots import linear
    from inrun_megatron.shapley import consumers

    interpret = GridExecutor.__call__

    def run(self: Any, *arguments: Any, **options: Any) -> Any:
        operations.counts["kernel"] += not operations.paused
        operations.paused, before = True, operations.paused
        try:
            return interpret(self, *arguments, **options)
        finally:
            operations.paused = before

    with (
        mock.patch.object(GridExecutor, "__call__", run),
        mock.patch.object(linear, "by_triton", lambda *tensors: True),
        mock.patch.object(consumers, "by_triton", lambda *tensors: True),
    ):
        yield


def _operations(rank: int, world: int, case: Case) -> Counter[str]:
    """Of the second step; a function for `run_cases`."""
    from inrun_megatron import InRunShapley, Layout, ShapleyTarget
    from inrun_megatron.models import token_losses

    engine = build_engine(case.layout)
    layout = Layout.current()
    operations = Operations()
    shapley = None
    if case.scoring:
        target = case.layout.targets()[0]
        given = ShapleyTarget(target.name, share(target, layout, 5, pipeline=False), target.num_tokens)
        shapley = InRunShapley(engine, [given], token_losses, layout=layout)
    for iteration, batch in enumerate(case.layout.batches(), start=1):
        operations.counts.clear()
        with operations:
            if shapley is None:
                for m in batch[0]:
                    forward_backward(engine, m)
                continue
            with (
                _as_on_a_gpu(operations) if case.kernels else nullcontext(),
                shapley.step(iteration) as step,
            ):
                for m in batch[0]:
                    with step.samples(m["dataset"], m["sample"], m["loss_mask"]):
                        forward_backward(engine, m)
        assert step.result.scored
    return operations.counts


def _added(cases: list[Case]) -> tuple[Counter[str], Counter[str]]:
    """Of both sizes' last ones: what a microbatch more takes there than where the other size is smaller; plain, and scored beyond it."""
    both = [replace(case, scoring=scoring) for scoring in (False, True) for case in cases]
    counts = [ranks[0] for ranks in assert_cases(run_cases(_operations, 1, both, timeout=300))]
    plain, scored = (
        {name: few[name] - more[name] - wide[name] + large[name] for name in {*few, *more, *wide, *large}}
        for few, more, wide, large in (counts[:4], counts[4:])
    )
    beyond = {name: scored.get(name, 0) - plain.get(name, 0) for name in {*plain, *scored}}
    return Counter(plain), Counter({name: count for name, count in beyond.items() if count})


@pytest.mark.parametrize(("rows", "kernels"), BEYOND_PLAIN)
def test_operations_of_a_layer_in_a_microbatch(rows: int, kernels: bool) -> None:
    sizes = [(layers, accumulation) for layers in (1, 2) for accumulation in (1, 2)]
    layouts = [replace(SMALL, layers=n, accumulation=m, micro_batch=rows) for n, m in sizes]
    plain, beyond = _added([Case(layout, kernels=kernels) for layout in layouts])
    print(
        f"{rows} rows, kernels {kernels}: {plain.total()} operations, scored {beyond.total()} more:", beyond
    )
    assert 0 < beyond.total() <= BEYOND_PLAIN[rows, kernels]


@pytest.mark.parametrize("rows", [1, 2])
def test_operations_of_an_expert_in_a_microbatch(rows: int) -> None:
    """A kernel for each of its two layers. Of several rows the kernel takes the product, too, and its buffers are sorted by row."""
    sizes = [(experts, accumulation) for experts in (2, 4) for accumulation in (1, 2)]
    small = replace(SMALL, shape="llama", layers=1, micro_batch=rows)
    layouts = [replace(small, experts=n, accumulation=m) for n, m in sizes]
    plain, beyond = _added([Case(layout, kernels=True) for layout in layouts])
    print(
        f"{rows} rows: {plain.total() / 2} operations of an expert, scored {beyond.total() / 2} more:", beyond
    )
    assert 0 < beyond.total() / 2 <= {1: 2, 2: 4}[rows]
