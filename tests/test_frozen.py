"""Values of models of which a part is frozen: by the oracle, to which frozen parameters are constants."""

from __future__ import annotations

from tests.distributed import assert_cases, run_cases
from tests.layout_runs import TOLERANCE, deviation, side_figures, train
from tests.layouts import LayoutCase

EMBEDDINGS = ("embedding.",)  # with them the tied output layer
# Recomputed layers behind frozen embeddings have an input without a gradient. Under a pipeline the first stage may hold no
# gradient that its stage counts: "decoder." leaves the tied weight, which counts on the other stage or is shared.
CASES = [
    LayoutCase(2, 1, False, 2, 2, "gpt2", "adamw", frozen=EMBEDDINGS, recompute=True),
    LayoutCase(2, 2, True, 3, 1, "llama", "adamw", frozen=EMBEDDINGS, recompute=True),
    LayoutCase(2, 1, False, 1, 2, "gpt2", "adamw", frozen=EMBEDDINGS, recompute=True, pp=2),
    LayoutCase(2, 1, False, 0, 2, "gpt2", "adamw", frozen=("decoder.",), pp=2),
    LayoutCase(
        2, 2, True, 1, 1, "gpt2", "momentum", frozen=("decoder.layers.0.", "decoder.final"), base="drift"
    ),
]


def test_values_equal_the_oracle() -> None:
    failures = []
    for case, ranks in zip(CASES, assert_cases(run_cases(train, 2, CASES, timeout=240)), strict=True):
        oracle = case.oracle()
        for step in range(case.steps):
            found = deviation(ranks, oracle, step)
            print(f"{case}: step {step + 1}: {found:.1e}")
            if not found < TOLERANCE["fp32"]:
                failures.append(f"{case}: step {step + 1}: {found:.2e} of the largest value")
        failures += side_figures(case, ranks, oracle)
    assert not failures, "\n".join(failures)
