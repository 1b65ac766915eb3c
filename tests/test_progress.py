"""What a run prints: progress as lines or a bar, and the line of its audits."""

from __future__ import annotations

import io

from inrun_megatron.training.progress import ProgressBar, StepFigures


def _figures(iteration: int) -> StepFigures:
    return StepFigures(
        iteration=iteration,
        loss=5.0,
        lr=1e-3,
        tokens=1000,
        seconds=0.5,
        seconds_scoring=0.1,
        gradient_norm=1.5,
        targets={"code": 5.25},
    )


def test_progress_without_a_terminal_is_lines() -> None:
    stream = io.StringIO()
    bar = ProgressBar(4, 0, 2, stream=stream)
    for iteration in range(1, 5):
        bar.step(_figures(iteration))
    bar.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2 and "\r" not in stream.getvalue()
    assert lines[0].startswith("step 2/4 | loss 5.0000 | code 5.2500 | lr 1.00e-03 | grad norm 1.50")
    assert lines[0].endswith("2,000 tokens/s | scoring 20%")


def test_progress_on_a_terminal_is_a_bar() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    bar = ProgressBar(4, 2, 10, stream=stream)
    bar.step(_figures(3))
    bar.write("a line")
    bar.close()
    assert "3/4" in stream.getvalue() and "code 5.2500" in stream.getvalue() and "a line" in stream.getvalue()
    silent = Terminal()
    ProgressBar(4, 0, 1, enabled=False, stream=silent).step(_figures(1))
    assert silent.getvalue() == ""


def test_an_audit_line_says_which_way_the_loss_went() -> None:
    from inrun_megatron.training.reporting import audit_line

    audits = {"audit/additivity/code": 1e-8, "audit/realised/code": -7.6e-6, "audit/predicted/code": 2.8e-2}
    assert audit_line(50, audits) == (
        "step 50: audit | code: additivity off by 1.0e-08, loss fell by -7.6e-06 in one step (predicted +2.8e-02)"
    )
    assert audit_line(50, {"audit/additivity/code": 1e-8}).endswith("additivity off by 1.0e-08")
