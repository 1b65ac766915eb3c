"""Ends a run whose training is lost, before it writes a checkpoint of it or spends its hours on it."""

from __future__ import annotations

import math

from inrun_megatron.config import Config
from inrun_megatron.training.progress import StepFigures

SKIPPED_IN_A_ROW = 50
"""So many steps without an update, and nothing that would change it: with a dynamic loss scale the next may fit."""


class Health:
    """Looks at each step's figures, which the host has anyway; every rank has the same and finds the same."""

    def __init__(self, config: Config) -> None:
        training = config.training
        self._stops_at_nan = training.check_for_nan_in_loss_and_grad
        # DeepSpeed ends a dynamic scale by itself, at its smallest.
        self._counts_skips = not (training.fp16 and not training.loss_scale)
        self._loss_scale = training.loss_scale if training.fp16 else None
        self._skipped = 0

    def fault(self, figures: StepFigures) -> str | None:
        """What ends the run after this step, in one line; None where it may go on.

        A step that the optimizer skipped has left the weights as they were, so that the next may do better: only many
        in a row end a run. One that it took with a loss or gradient norm that is not finite has put NaN into the weights.
        """
        self._skipped = self._skipped + 1 if figures.skipped else 0
        if self._skipped >= SKIPPED_IN_A_ROW and self._counts_skips:
            scale = f" at --loss-scale {self._loss_scale:g}" if self._loss_scale else ""
            remedy = (
                "lower it, or leave it out for a dynamic one" if scale else "look at the data and the loss"
            )
            return (
                f"the optimizer skipped the last {self._skipped} steps, up to {figures.iteration}: gradients are not "
                f"finite{scale}; {remedy}"
            )
        if figures.skipped or not self._stops_at_nan:
            return None
        for name, number in (("training loss", figures.loss), ("gradient norm", figures.gradient_norm)):
            if number is not None and not math.isfinite(number):
                return (
                    f"the {name} of step {figures.iteration} is {number}, and the optimizer took the step: start again from "
                    "the last checkpoint with a lower --lr or --clip-grad, or without the step's data "
                    "(--no-check-for-nan-in-loss-and-grad trains on)"
                )
        return None
