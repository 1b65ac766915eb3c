"""A layout case trained and scored on real engines, and how far its values are from the oracle's."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.layout_engine import build_engine, forward_backward, named_parameters, share
from tests.layouts import TARGET_SEQUENCES, LayoutCase
from tests.oracle import OracleRun, Parameters

TOLERANCE = {"fp32": 1e-5, "bf16": 0.15, "fp16": 5e-2}
"""How far values may be from the oracle's, of the largest, by precision."""
STEPS_CHECKED = (0, 2)  # the first step, and the last


@dataclass(frozen=True)
class Ran:
    """What one rank saw."""

    place: tuple[int, int, int]  # (tp rank, dp rank, pp rank)
    values: list[Tensor | None]  # per step [rows of this replica, K]
    samples: list[Tensor]  # per step [rows of this replica]
    target_losses: list[list[float] | None]
    clip: list[float | None]
    drift: list[list[float] | None]
    additivity: list[tuple[list[float], list[float]] | None]
    weights: Parameters
    counters: tuple[int, int, int]  # global steps, micro steps, skipped steps
    rng: Tensor
    statuses: list[str]
    losses: list[float]  # the pipeline engine's training losses
    parts: list[dict[tuple[int, int], Tensor]]  # per step {(sample, ordinal): values [K]}
    ages: list[int | None]  # of the directions, per step


def train(rank: int, world: int, case: LayoutCase) -> Ran:
    """Run the case on this rank; a function for `run_cases`."""
    from deepspeed.utils import safe_get_full_fp32_param

    from inrun_megatron import InRunShapley, Layout, PipelineShapley, ShapleyTarget, attach_taps
    from inrun_megatron.engines.pipeline import train_batch
    from inrun_megatron.models import token_losses
    from inrun_megatron.models.recompute import enable_recompute

    engine = build_engine(case)
    layout = Layout.current()
    taps = attach_taps(engine.module)
    if case.recompute and case.pp > 1:
        engine.module.recompute(taps.capture)
    elif case.checkpoints:
        _checkpoint_blocks(engine.module)
    elif case.recompute:
        enable_recompute(engine.module.decoder, 1, wrap=taps.capture)
    size = case.micro_batch if case.pp > 1 else 2  # a pipeline has one shape for all its microbatches
    targets = [
        ShapleyTarget(t.name, share(t, layout, size, pipeline=case.pp > 1), t.num_tokens)
        for t in case.targets()
    ]
    shapley: Any = None
    if case.scoring:
        kind: Any = InRunShapley if case.pp == 1 else PipelineShapley
        loss = token_losses if case.pp == 1 else engine.module.loss_fn
        shapley = kind(
            engine,
            targets,
            loss,
            layout=layout,
            taps=taps,
            optimizer="sgd" if case.proxy else "auto",
            estimator=case.estimator,
            base=case.base,
            credit=case.credit,
            total_steps=case.steps,
            refresh=case.refresh,
            direction_dtype=case.direction_dtype,
        )
    results, samples, losses = [], [], []
    for iteration, batch in enumerate(case.batches(), start=1):
        own = batch[layout.dp_rank]
        for group in engine.optimizer.param_groups if case.lr_growth != 1.0 else ():
            group["lr"] = case.lr * case.lr_growth ** (iteration - 1)
        samples.append(torch.cat([m["sample"] for m in own]))
        if shapley is None:
            if case.pp > 1:
                losses.append(float(train_batch(engine, [engine.module.loss_fn.split(m) for m in own])))
            for microbatch in own if case.pp == 1 else ():
                forward_backward(engine, microbatch)
            continue
        with shapley.step(iteration, own) as step:
            if case.pp > 1:
                losses.append(step.train_batch(own))
            for microbatch in own if case.pp == 1 else ():
                with step.samples(
                    microbatch["dataset"],
                    microbatch["sample"],
                    microbatch["loss_mask"],
                    microbatch.get("segments"),
                ):
                    forward_backward(engine, microbatch)
        results.append(step.result)
    weights = {}
    for name, parameter in named_parameters(engine.module).items():
        if not parameter.requires_grad:
            continue
        full = safe_get_full_fp32_param(parameter) if case.zero > 0 else parameter.detach()
        weights[name] = full.detach().float().clone()
    return Ran(
        place=(layout.tp_rank, layout.dp_rank, layout.pp_rank),
        values=[r.values for r in results],
        samples=samples,
        target_losses=[r.target_losses for r in results],
        clip=[r.clip_coefficient for r in results],
        drift=[
            None
            if r.momentum_terms is None
            else [m + d for m, d in zip(r.momentum_terms, r.decay_terms, strict=True)]
            for r in results
        ],
        additivity=[
            None if r.additivity_lhs is None else (r.additivity_lhs, r.additivity_rhs) for r in results
        ],
        weights=weights,
        counters=(engine.global_steps, engine.micro_steps, engine.skipped_steps),
        rng=torch.get_rng_state(),
        statuses=[r.status for r in results],
        losses=losses,
        parts=[_parts(r, s) for r, s in zip(results, samples)],
        ages=[r.direction_age for r in results],
    )


def _checkpoint_blocks(module: Any) -> None:
    """PipelineModule's own recomputation, as its constructor's arguments ask for it."""
    from torch.utils.checkpoint import checkpoint

    module.activation_checkpoint_interval = 1
    module.activation_checkpoint_func = functools.partial(checkpoint, use_reentrant=True)
    module.checkpointable_layers = ["Block"]
    module._precompute_checkpointable_values()


def _parts(result: Any, samples: Tensor) -> dict[tuple[int, int], Tensor]:
    if result.parts is None:
        return {}
    rows, ordinals = result.places
    return {
        (int(samples[row]), int(ordinal)): values
        for row, ordinal, values in zip(rows, ordinals, result.parts, strict=True)
    }


def by_sample(ranks: list[Ran], step: int) -> dict[int, Tensor]:
    """Values [K] of every sample of a step; all ranks of a replica must agree."""
    found: dict[int, Tensor] = {}
    for ran in ranks:
        values = ran.values[step]
        assert values is not None, ran.statuses[step]
        for sample, value in zip(ran.samples[step].tolist(), values, strict=True):
            if sample in found:
                assert torch.equal(found[sample], value), f"ranks of a replica disagree about sample {sample}"
            found[sample] = value
    return found


def deviation(ranks: list[Ran], oracle: OracleRun, step: int) -> float:
    """Largest difference from the oracle's values over the largest value, all targets of one step."""
    truth = {sample: value for (_, sample), value in oracle.steps[step].by_sample().items()}
    found = by_sample(ranks, step)
    assert found.keys() == truth.keys()
    worst = torch.zeros(len(TARGET_SEQUENCES), dtype=torch.float64)
    largest = torch.zeros_like(worst)
    for sample, value in truth.items():
        worst = torch.maximum(worst, (found[sample] - value).abs())
        largest = torch.maximum(largest, value.abs())
    return float((worst / largest).max())


def side_figures(
    case: LayoutCase, ranks: list[Ran], oracle: OracleRun, tolerances: dict[str, float] = TOLERANCE
) -> list[str]:
    """What differs from the oracle of target losses, clip coefficient, drift terms and both sides of the additivity audit,
    on any rank."""
    failures = []
    tolerance = tolerances[case.precision]
    for step, truth in enumerate(oracle.steps):
        assert truth.clip_coefficient < 1.0, "clipping must be active"
        assert truth.values is not None
        for ran in ranks:
            additivity = ran.additivity[step]
            assert additivity is not None
            checks: dict[str, Any] = {
                "target losses": (
                    ran.target_losses[step],
                    truth.target_losses,
                    truth.target_losses.abs().max(),
                ),
                "clip coefficient": (ran.clip[step], truth.clip_coefficient, truth.clip_coefficient),
                "additivity": (
                    *additivity,
                    truth.values.abs().sum(0).max() / truth.clip_coefficient,
                ),
            }
            if not case.proxy:
                scale = truth.drift.abs().max() + truth.values.abs().sum(0).max()
                checks["drift"] = (ran.drift[step], truth.drift, scale)
            for name, (found, expected, scale) in checks.items():
                difference = (
                    (torch.as_tensor(found).double() - torch.as_tensor(expected).double()).abs().max()
                )
                if not difference <= tolerance * scale:
                    failures.append(f"{case}: step {step + 1}: {name} {found}, expected {expected}")
    return failures
