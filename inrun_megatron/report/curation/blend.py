"""Weights of the datasets, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp

from inrun_megatron.errors import UserError
from inrun_megatron.report.curation.candidates import Candidates
from inrun_megatron.report.curation.rules import Blend, Rules


def blend_weights(datasets: Sequence[Candidates], rules: Rules) -> tuple[list[float], list[float]]:
    """Weight of each dataset in the blend before and after, each summing to 1; 0 for a dataset with nothing left.

    Blend.value moves weights as DoGE does (arXiv 2310.15393: multiplicative weights on how well a domain's gradient
    agrees with the target's), with the values of the run in place of a proxy model's.
    """
    whole = [data.tokens[data.train].sum() for data in datasets]
    given = [data.weight for data in datasets]
    base = (
        whole
        if any(weight is None for weight in given)
        else [float(weight) for weight in given if weight is not None]
    )
    left = [float(data.tokens[data.kept].sum()) for data in datasets]
    if rules.blend is Blend.keep:
        after = [weight if tokens else 0.0 for weight, tokens in zip(base, left, strict=True)]
        return _shares(base), _shares(after)
    after = _shares([w * own / max(all_, 1) for w, own, all_ in zip(base, left, whole, strict=True)])
    if rules.blend is Blend.value:
        values = [data.mean_score(data.kept) for data in datasets]
        if all(value is None for value in values):
            raise UserError("no kept document has a value to weigh datasets by; use --blend tokens or keep")
        largest = max(abs(value) for value in values if value is not None) or 1.0
        gains = [exp(rules.strength * (value or 0.0) / largest) for value in values]
        moved = _shares([weight * gain for weight, gain in zip(after, gains, strict=True)])
        after = [
            rules.smoothing * old + (1 - rules.smoothing) * new for old, new in zip(after, moved, strict=True)
        ]
    return _shares(base), after


def _shares(weights: Sequence[float]) -> list[float]:
    total = float(sum(weights))
    return [float(weight) / total for weight in weights]
