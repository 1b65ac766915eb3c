"""What a run says of its steps: to the progress bar, and every few steps to the monitors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from inrun_megatron.config import Config
from inrun_megatron.ledger.schema import DRIFT
from inrun_megatron.parallel import Layout
from inrun_megatron.shapley.result import StepResult
from inrun_megatron.training.batches import Microbatch
from inrun_megatron.training.monitor import Monitor
from inrun_megatron.training.progress import ProgressBar, StepFigures


class Reporter:
    """Passes a step's figures on.

    Args:
        bar, monitor: where they go.
        values: of the domains; None under --no-shapley.
    """

    def __init__(
        self, config: Config, bar: ProgressBar, monitor: Monitor, values: DomainValues | None
    ) -> None:
        self._audit_interval, self._log_interval = config.shapley.audit_interval, config.logging.log_interval
        self._bar, self._monitor, self._values = bar, monitor, values
        self._audits = None if values is None else Audits(values.targets)

    def step(
        self, figures: StepFigures, result: StepResult | None, microbatches: Sequence[Microbatch]
    ) -> None:
        """One more step is done; `result` is None where nothing may be scored. Collective over the data-parallel group."""
        iteration = figures.iteration
        self._bar.step(figures)
        audits: dict[str, float | None] = {} if self._audits is None else self._audits.step(result)
        if audits and iteration % self._audit_interval == 0:
            self._monitor.write(iteration, audits)
            self._bar.write(audit_line(iteration, audits))
        if not self._monitor.enabled:
            return
        if self._values is not None and result is not None:
            self._values.add(result, torch.cat([m["dataset"] for m in microbatches]))
        if iteration % self._log_interval:
            return
        out: dict[str, float | None] = {
            "train/loss": figures.loss,
            "train/lr": figures.lr,
            "train/grad_norm": figures.gradient_norm,
            "train/tokens_per_second": figures.tokens / figures.seconds,
            "train/consumed_samples": float(figures.consumed_samples),
        }
        out |= {f"targets/{name}": loss for name, loss in figures.targets.items()}
        if self._values is not None:
            out["train/scoring_share"] = figures.seconds_scoring / figures.seconds
            out |= self._values.report()
        self._monitor.write(iteration, out)

    def validation(self, iteration: int, loss: float) -> None:
        """The loss per token on the validation split, nats."""
        self._bar.write(f"step {iteration}: validation loss {loss:.4f}")
        self._monitor.write(iteration, {"validation/loss": loss})


class DomainValues:
    """Mean value per sample of each (target, dataset) since the last report, over all data-parallel ranks.

    Args:
        targets, datasets: their names, in the order of a step's values and of the data's table.
        device: where the backend reduces tensors.
    """

    def __init__(
        self, targets: Sequence[str], datasets: Sequence[str], layout: Layout, device: torch.device
    ) -> None:
        self.targets, self._datasets = list(targets), list(datasets)
        self._layout, self._device = layout, device
        # per dataset: sum of values per target, then samples
        self._sums = torch.zeros(len(datasets), len(targets) + 1, dtype=torch.float64)

    def add(self, result: StepResult, datasets: torch.Tensor) -> None:
        """result.values [rows, K] of this rank; datasets [rows]."""
        if result.values is not None:
            rows = torch.cat(
                [result.values.double(), torch.ones(len(datasets), 1, dtype=torch.float64)], dim=1
            )
            self._sums.index_add_(0, datasets.cpu().long(), rows)

    def report(self) -> dict[str, float | None]:
        """`values/<target>/<dataset>`; starts anew. Collective over the data-parallel group."""
        sums = self._sums.to(self._device, copy=True)
        dist.all_reduce(sums, group=self._layout.dp_group)
        self._sums.zero_()
        figures: dict[str, float | None] = {}
        for row, dataset in zip(sums.tolist(), self._datasets, strict=True):
            *values, samples = row
            for target, value in zip(self.targets, values, strict=True):
                figures[f"values/{target}/{dataset}"] = value / samples if samples else None
        return figures


class Audits:
    """Figures of the audits for log and monitors; `inrun verify` judges them from the ledger."""

    def __init__(self, target_names: Sequence[str]) -> None:
        self._names = list(target_names)
        self._previous: StepResult | None = None

    def step(self, result: StepResult | None) -> dict[str, float | None]:
        """Additivity of this step and efficiency of the one before, which needs this step's target losses."""
        figures: dict[str, float | None] = {}
        before, self._previous = self._previous, result
        if result is None or not result.scored:
            return figures
        assert result.additivity_lhs is not None and result.additivity_rhs is not None
        for k, name in enumerate(self._names):
            left, right = result.additivity_lhs[k], result.additivity_rhs[k]
            scale = max(abs(left), abs(right))
            figures[f"audit/additivity/{name}"] = abs(left - right) / scale if scale else 0.0
            if before is None or not before.scored:
                continue
            # Both losses are known where both steps took their own directions.
            if before.target_losses and result.target_losses:
                assert before.step_sums
                # Between two losses at Phi(0) lie this batch and the *next* step's drift.
                drifting = result if result.base == DRIFT else before
                assert drifting.momentum_terms is not None and drifting.decay_terms is not None
                figures[f"audit/realised/{name}"] = before.target_losses[k] - result.target_losses[k]
                figures[f"audit/predicted/{name}"] = (
                    before.step_sums[k] + drifting.momentum_terms[k] + drifting.decay_terms[k]
                )
        return figures


def audit_line(iteration: int, audits: Mapping[str, float | None]) -> str:
    """One line with the audits of every target."""
    parts = []
    for name in (
        key.removeprefix("audit/additivity/") for key in audits if key.startswith("audit/additivity/")
    ):
        text = f"{name}: additivity off by {audits[f'audit/additivity/{name}']:.1e}"
        realised, predicted = audits.get(f"audit/realised/{name}"), audits.get(f"audit/predicted/{name}")
        if realised is not None and predicted is not None:
            text += f", loss fell by {realised:+.1e} in one step (predicted {predicted:+.1e})"
        parts.append(text)
    return f"step {iteration}: audit | " + " | ".join(parts)
