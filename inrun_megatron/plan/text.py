"""A plan as one record, and several plans as a table: columns are jobs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from inrun_megatron.plan import predict
from inrun_megatron.plan.job import Job, count
from inrun_megatron.plan.times import Hardware, time


def record(job: Job, hardware: Hardware) -> dict[str, Any]:
    """All predictions for one job, JSON-serialisable."""
    memory, taken, work = predict.memory(job), time(job, hardware), predict.operations(job)
    rows, size = predict.ledger(job)
    sent = predict.collectives(job)
    return {
        "job": asdict(job)
        | {"base": job.resolved_base, "data_parallel": job.data_parallel, "microbatches": job.microbatches},
        "hardware": asdict(hardware),
        "parameters_per_rank": count(job.parameters),
        "memory": asdict(memory) | {"held": memory.held, "peak": memory.peak},
        "collectives": [asdict(own) for own in sent],
        "communication": {"count": sum(own.count for own in sent), "bytes": sum(own.bytes for own in sent)},
        "operations": asdict(work) | {"extra": work.extra},
        "ledger": {"rows": rows, "bytes": size},
        "time": asdict(taken)
        | {
            "scored_overhead": taken.scored_overhead,
            "overlapped_overhead": taken.overlapped_overhead,
            "overhead": taken.overhead,
        },
    }


Cell = Callable[[Mapping[str, Any]], str]


def _layout(plan: Mapping[str, Any]) -> str:
    job = plan["job"]
    sequence = "+SP" if job["sequence_parallel"] else ""
    return f"TP{job['tensor_parallel']}{sequence} PP{job['pipeline_parallel']} DP{job['data_parallel']}"


def _scored(plan: Mapping[str, Any]) -> str:
    job = plan["job"]
    based = job["estimator"] == "first_order"  # the path estimators have no base
    return f"{job['estimator']}, {job['base']}" if based else str(job["estimator"])


def _second_pass(plan: Mapping[str, Any]) -> str:
    work = plan["operations"]
    return f"{work['batch'] / work['training']:+.2%}" if work["batch"] else "-"


ROWS: tuple[tuple[str, Cell], ...] = (
    ("GPUs", lambda p: f"{p['job']['world_size']:,}"),
    ("layout", _layout),
    ("ZeRO stage", lambda p: str(p["job"]["zero_stage"])),
    ("sequence, batch", lambda p: f"{p['job']['seq_length']:,} x {p['job']['global_batch_size']:,}"),
    ("estimator, base", _scored),
    ("targets x sequences", lambda p: f"{p['job']['targets']} x {p['job']['target_sequences']}"),
    ("scored steps", lambda p: "every" if p["job"]["interval"] == 1 else f"1 of {p['job']['interval']}"),
    ("own direction", lambda p: "-" if p["job"]["refresh"] == 1 else f"1 of {p['job']['refresh']} scored"),
    ("parameters per rank", lambda p: scaled(p["parameters_per_rank"])),
    ("**memory per rank**: directions", lambda p: size(p["memory"]["directions"])),
    ("their fp32 sums, beyond that", lambda p: size(p["memory"]["sums"])),
    ("parts of buckets on their way", lambda p: size(p["memory"]["parts"])),
    ("their exchange, for a moment", lambda p: size(p["memory"]["exchange"])),
    ("rounding to bf16, for a moment", lambda p: size(p["memory"]["rounding"])),
    ("batch gradient", lambda p: size(p["memory"]["batch_gradient"])),
    ("copy of moved weights", lambda p: size(p["memory"]["saved_weights"])),
    ("one layer, for a moment", lambda p: size(p["memory"]["layer"])),
    ("conditioning, for a moment", lambda p: size(p["memory"]["conditioning"])),
    ("activations", lambda p: size(p["memory"]["activations"])),
    ("all at its peak", lambda p: size(p["memory"]["peak"])),
    ("**communication** of a scored step", lambda p: size(p["communication"]["bytes"])),
    ("collectives", lambda p: f"{p['communication']['count']:,}"),
    (
        "**operations** beside training's",
        lambda p: f"{p['operations']['extra'] / p['operations']['training']:+.2%}",
    ),
    ("of them validation", lambda p: f"{p['operations']['validation'] / p['operations']['training']:+.2%}"),
    (
        "a second pass over the batch",
        _second_pass,
    ),
    ("dots", lambda p: f"{p['operations']['dots'] / p['operations']['training']:+.3%}"),
    ("**ledger** rows", lambda p: scaled(p["ledger"]["rows"])),
    ("bytes", lambda p: size(p["ledger"]["bytes"])),
    ("**time** of a step without scoring", lambda p: f"{p['time']['training']:.2f} s"),
    ("passes", lambda p: _share(p, "passes")),
    ("dots (memory traffic)", lambda p: _share(p, "dots")),
    ("elementwise (memory traffic)", lambda p: _share(p, "elementwise")),
    ("communication", lambda p: _share(p, "communication")),
    ("of it behind passes, at best", lambda p: _share(p, "hidden")),
    ("**overhead** of a scored step", lambda p: f"{p['time']['scored_overhead']:+.1%}"),
    ("with that hidden", lambda p: f"{p['time']['overlapped_overhead']:+.1%}"),
    ("over the run", lambda p: f"{p['time']['overhead']:+.1%}"),
)


def _share(plan: Mapping[str, Any], part: str) -> str:
    return f"{plan['time'][part] / plan['time']['training']:+.1%}"


def table_rows(plans: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Heading and cells of every row, one column per plan; rows without a figure in any plan are left out."""
    rows = [[name, *(cell(plan) for plan in plans.values())] for name, cell in ROWS]
    return [row for row in rows if set(row[1:]) != {"-"}]


def markdown(plans: Mapping[str, Mapping[str, Any]]) -> str:
    """The table for a document."""
    lines = [["", *plans], ["---"] * (len(plans) + 1), *table_rows(plans)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def size(number: float) -> str:
    """Bytes with a decimal unit."""
    return "-" if not number else scaled(number, "B")


def scaled(number: float, unit: str = "") -> str:
    """Three digits and k, M, G, T, P."""
    for letter in ("", "k", "M", "G", "T", "P"):
        if abs(number) < 999.5 or letter == "P":
            return f"{number:.3g} {letter}{unit}".strip()
        number /= 1000
    raise AssertionError("unreachable")
