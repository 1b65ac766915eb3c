"""Resuming in another parallel layout: tensor, pipeline and data parallel sizes, ZeRO stage and precision."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from inrun_megatron.engines.reshape import Saved
from inrun_megatron.errors import UserError
from inrun_megatron.models.initialise import Cut, joined, shard
from inrun_megatron.training import run_state
from inrun_megatron.training.arguments import parse
from tests import real_text
from tests.distributed import Workers
from tests.real_text import (
    TARGETS,
    arguments,
    checkpoint_differences,
    ledger,
    refused,
    run_here,
)

data = real_text.data  # a fixture

LLAMA = (
    "--untie-embeddings-and-output-weights --normalization RMSNorm --swiglu --disable-bias-linear "
    "--position-embedding-type rope --group-query-attention --num-query-groups 2 --qk-layernorm"
)
EXPERTS = (
    f"{LLAMA} --num-experts 4 --moe-ffn-hidden-size 16 --moe-layer-freq 2 --moe-shared-expert-intermediate-size 8 "
    "--moe-shared-expert-gate --moe-router-score-function sigmoid --moe-router-enable-expert-bias "
    "--moe-router-bias-update-rate 0.003 --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0.01"
)
GATED = LLAMA.replace("--disable-bias-linear ", "")
TP, PP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"
# Every step of a circle is a resume in another layout; its end is its beginning.
CIRCLES = {
    "gpt2, fp32": (
        "",
        [
            f"{TP} 2 --sequence-parallel --zero-stage 2",
            f"{PP} 2 --zero-stage 1",
            "--zero-stage 3",
            f"{TP} 2 {PP} 2 --zero-stage 0",
            "--zero-stage 0",
            f"{PP} 4 --zero-stage 1",
            "--zero-stage 2",
        ],
    ),
    "llama, bf16": (
        LLAMA,
        [
            "--zero-stage 1 --bf16",
            f"{TP} 2 --zero-stage 3 --bf16",
            f"{PP} 2 --zero-stage 1 --bf16",
            f"{TP} 2 {PP} 2 --zero-stage 0",
            f"{TP} 2 --sequence-parallel --zero-stage 2 --bf16",
            "--zero-stage 3",
        ],
    ),
    "experts, fp32": (
        EXPERTS,
        [
            f"{TP} 2 --sequence-parallel --zero-stage 2",
            f"{PP} 2 --zero-stage 1",
            "--zero-stage 3",
            f"{TP} 2 {PP} 2 --sequence-parallel --zero-stage 0",
            "--zero-stage 2",
        ],
    ),
    "gpt2, fp16": (
        "",
        ["--zero-stage 1 --fp16", "--zero-stage 3 --fp16", f"{PP} 2 --zero-stage 1 --fp16"],
    ),
    "gated with biases, sgd": (
        f"{GATED} --optimizer sgd --sgd-momentum 0.9",
        [f"{TP} 2 --zero-stage 1", "--zero-stage 3", f"{TP} 2 {PP} 2 --zero-stage 1"],
    ),
}
FIXED = ("--num-layers", "4", "--attention-dropout", "0", "--hidden-dropout", "0")


def _pass_on(rank: int, world: int, argv: list[str]) -> tuple[list[dict[str, Any]], float]:
    """Load a checkpoint and save it again, with nothing between; the optimizer's settings, and what it clips to."""
    from inrun_megatron.engines import ZeroAdapter
    from inrun_megatron.parallel import Layout
    from inrun_megatron.training import checkpoint, datasets, distributed, run_state
    from inrun_megatron.training.arguments import parse
    from inrun_megatron.training.engine import build_trainer
    from inrun_megatron.training.run import prepare

    resolved = prepare(parse(argv), world)
    config = resolved.config
    distributed.initialise(config.parallel)
    vocabulary = datasets.vocabulary(config)
    resume = run_state.to_resume(config)
    assert resume is not None
    trainer = build_trainer(config, resolved.deepspeed, resolved.batch, vocabulary.vocab_size)
    checkpoint.save(config, trainer, checkpoint.load(config, trainer, resume)[0])
    settings = [{k: group[k] for k in group if k != "params"} for group in trainer.optimizer.param_groups]
    return settings, ZeroAdapter(trainer.engine, Layout.current()).clip_threshold


def _in_fp16(
    rank: int, world: int, function: Callable[[int, int, list[str]], object], argv: list[str]
) -> None:
    """DeepSpeed's engine runs fp16 on a CPU, but its accelerator says that it does not."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    answer = accelerator.is_fp16_supported
    accelerator.is_fp16_supported = lambda: True
    try:
        function(rank, world, argv)
    finally:
        accelerator.is_fp16_supported = answer


@pytest.mark.slow
@pytest.mark.parametrize("name", CIRCLES)
def test_a_checkpoint_goes_through_every_layout_unchanged(
    four_ranks: Workers, data: Path, tmp_path: Path, name: str
) -> None:
    """Weights, masters, moments, step counts, schedule, loss scale and counters, bit for bit."""
    model, layouts = CIRCLES[name]
    flags = [*FIXED, *model.split(), "--no-shapley", "--train-iters", "2"]
    first = tmp_path / "0"

    def run(function: Callable[[int, int, list[str]], object], argv: list[str]) -> None:
        if "fp16" in name:
            four_ranks.run(_in_fp16, function, argv)
        else:
            four_ranks.run(function, argv)

    run(run_here, arguments(data, *flags, *layouts[0].split(), "--save", str(first)))
    if "experts" in name:
        saved = torch.load(first / "checkpoints/iter_0000002/mp_rank_00_model_states.pt", weights_only=False)
        assert len(saved["expert_biases"]) == 2 and all(map(any, saved["expert_biases"].values()))
    before = first
    for number, layout in enumerate([*layouts[1:], layouts[0]], start=1):
        after = tmp_path / str(number)
        argv = arguments(data, *flags, *layout.split(), "--load", str(before), "--save", str(after))
        run(_pass_on, argv)
        before = after
    last = "checkpoints/iter_0000002"
    found = checkpoint_differences(first / last, before / last)
    # Random generators start anew in another layout.
    assert [text for text in found if not text.startswith("rng_")] == []
    assert any(text.startswith("rng_") for text in found)


ELSEWHERE = {
    "dp 2, zero 2 -> tp 2, zero 3": ("--zero-stage 2", f"{TP} 2 --sequence-parallel --zero-stage 3"),
    "tp 2, zero 0 -> pp 2, zero 1": (
        f"{TP} 2 --zero-stage 0 --shapley-base current",
        f"{PP} 2 --zero-stage 1",
    ),
    "tp 2, zero 1 -> dp 2, zero 3, experts": (
        f"{TP} 2 --sequence-parallel --zero-stage 1 {EXPERTS}",
        f"--zero-stage 3 {EXPERTS}",
    ),
    "tp 2 -> dp 2, gated with biases": (
        f"{TP} 2 --zero-stage 1 {GATED}",
        f"--zero-stage 1 {GATED}",
    ),
}


def _sorted_values(run: Path) -> list[dict[str, Any]]:
    key = ("step", "dataset", "sample", "target")
    return sorted(ledger(run, "values"), key=lambda row: [str(row[name]) for name in key])


def _agree(whole: Path, resumed: Path) -> None:
    pair = [_sorted_values(run) for run in (whole, resumed)]
    assert len(pair[0]) == len(pair[1]) == 4 * 8 * 2
    scale = max(abs(row["value"]) for row in pair[0])
    for before, after in zip(*pair, strict=True):
        assert {**before, "value": 0} == {**after, "value": 0}
        assert abs(before["value"] - after["value"]) < 1e-5 * scale
    assert any(row["value"] != other["value"] for row, other in zip(*pair, strict=True) if row["step"] > 2), (
        "the resumed steps were not run again"
    )


def _interrupted(data: Path, workers: Workers, flags: str, directory: Path) -> tuple[Path, Path]:
    """A run of four steps, and a copy of it that has lost what followed its checkpoint of step 2."""
    whole, resumed = directory / "whole", directory / "resumed"
    argv = arguments(data, *FIXED, *flags.split(), *TARGETS, "--save-interval", "2", "--lr-warmup-iters", "0")
    workers.run(run_here, [*argv, "--save", str(whole)])
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "iter_0000004")
    (resumed / "checkpoints" / "latest").write_text("iter_0000002")
    return whole, resumed


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_resume_in_another_layout_scores_the_same_samples(
    two_ranks: Workers, data: Path, tmp_path: Path, name: str
) -> None:
    """The ledger has the same rows, the values to rounding."""
    before, after = ELSEWHERE[name]
    whole, resumed = _interrupted(data, two_ranks, before, tmp_path)
    argv = arguments(data, *FIXED, *after.split(), *TARGETS, "--lr-warmup-iters", "0")
    two_ranks.run(run_here, [*argv, "--save", str(resumed), "--load", str(resumed)])
    _agree(whole, resumed)


def test_a_resume_on_another_number_of_ranks(two_ranks: Workers, data: Path, tmp_path: Path) -> None:
    """Two ranks, then one, then (from its checkpoint) two again; what cannot be resumed is refused."""
    whole, resumed = _interrupted(data, two_ranks, "--zero-stage 1", tmp_path)
    argv = arguments(data, *FIXED, *TARGETS, "--zero-stage", "1", "--lr-warmup-iters", "0")
    argv += ["--save", str(resumed), "--load", str(resumed)]
    shutil.copytree(whole / "checkpoints" / "iter_0000004", resumed / "checkpoints" / "iter_0000004")
    with Workers(1) as one_rank:
        one_rank.run(run_here, argv)
    _agree(whole, resumed)

    # What a longer run of two ranks had left at step 4 is gone with its notes.
    left = sorted(path.name for path in (resumed / "checkpoints" / "iter_0000004").glob("shards_*.json"))
    assert left == ["shards_00000.json"]
    again = [*argv, "--save", str(tmp_path / "again"), "--no-shapley"]
    two_ranks.run(_pass_on, again)
    assert "holds the checkpoints of a run" in refused(two_ranks, again)
    again[-2] = str(tmp_path / "elsewhere")
    heads = "was written with --num-attention-heads 4, this run has 2: give the flags of the model"
    assert heads in refused(two_ranks, [*again, "--num-attention-heads", "2"])
    longer = "was written with --max-position-embeddings 32, this run has 64: give the flags of the model"
    assert longer in refused(two_ranks, [*again, "--seq-length", "64"])
    # What run_state.json says of the model is not all: the notes have names and shapes.
    checkpoint = resumed / "checkpoints" / (resumed / "checkpoints" / "latest").read_text()
    written = (checkpoint / "run_state.json").read_text()
    state = json.loads(written)
    for changed, words in (
        ({"hidden_size": 64, "ffn_hidden_size": 256, "kv_channels": 16}, "word_embeddings.weight of shape"),
        ({"num_layers": 6}, "this run has a parameter decoder.layers.4"),
        ({"num_layers": 2}, "the checkpoint has a parameter decoder.layers.2"),
    ):
        (checkpoint / "run_state.json").write_text(json.dumps(state | {"model": state["model"] | changed}))
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in changed.items()]
        assert words in refused(two_ranks, [*again, *flags])
    del state["model"]
    (checkpoint / "run_state.json").write_text(json.dumps(state))
    assert "no complete checkpoint of this program: run_state.json has no model" in refused(two_ranks, again)
    (checkpoint / "run_state.json").write_text(written)
    (checkpoint / "shards_00000.json").unlink()
    assert "has no shards_*.json" in refused(two_ranks, again)


def test_a_checkpoint_of_an_earlier_version_says_less_of_its_model() -> None:
    config = parse(arguments(Path("nowhere"), "--no-shapley"))
    state: dict[str, Any] = {"model": run_state.model_of(config), "optimizer": "adam"}
    run_state.check_same_run(Path("here"), state, config)
    del state["model"]["max_position_embeddings"]
    run_state.check_same_run(Path("here"), state, config)
    state["model"]["max_position_embeddings"] = 16
    with pytest.raises(
        UserError, match="here was written with --max-position-embeddings 16, this run has 32"
    ):
        run_state.check_same_run(Path("here"), state, config)


def test_buffers_in_another_order_are_another_layout(two_ranks: Workers, data: Path, tmp_path: Path) -> None:
    """Of the same sizes, so that DeepSpeed would load each weight into another one's place."""
    argv = arguments(data, *FIXED, "--no-shapley", "--train-iters", "2", "--zero-stage", "2")
    in_turn = tmp_path / "in_turn.json"
    in_turn.write_text(json.dumps({"zero_optimization": {"round_robin_gradients": True}}))
    two_ranks.run(run_here, [*argv, "--save", str(tmp_path / "one")])
    flags = [
        "--load",
        str(tmp_path / "one"),
        "--save",
        str(tmp_path / "two"),
        "--deepspeed_config",
        str(in_turn),
    ]
    two_ranks.run(_pass_on, [*argv, *flags])
    one, two = (tmp_path / run / "checkpoints" / "iter_0000002" for run in ("one", "two"))
    notes = [(path / "shards_00000.json").read_text() for path in (one, two)]
    assert notes[0] != notes[1], "the setting reorders nothing"
    before, after = Saved(one), Saved(two)
    for name, about in json.loads(notes[0])["parameters"].items():
        for field in ("weight", "exp_avg"):
            whole = [
                saved._fragment(name, field, 0, 0, math.prod(about["shape"])) for saved in (before, after)
            ]
            assert torch.equal(*whole), (name, field)


def test_another_kind_of_device_is_another_layout(two_ranks: Workers, data: Path, tmp_path: Path) -> None:
    """A GPU's random streams are 16 bytes each, which a CPU's generator does not take."""
    argv = arguments(data, *FIXED, "--no-shapley", "--train-iters", "2", "--zero-stage", "1")
    two_ranks.run(run_here, [*argv, "--save", str(tmp_path / "one")])
    one, two = (tmp_path / run / "checkpoints" / "iter_0000002" for run in ("one", "two"))
    state = json.loads((one / "run_state.json").read_text())
    state["layout"]["device"] = "cuda"
    (one / "run_state.json").write_text(json.dumps(state))
    for file in one.glob("rng_*.pt"):
        streams = torch.load(file)
        streams["cuda"] = torch.zeros(16, dtype=torch.uint8)
        streams["tracker"] = dict.fromkeys(streams["tracker"], streams["cuda"])
        torch.save(streams, file)
    two_ranks.run(_pass_on, [*argv, "--load", str(tmp_path / "one"), "--save", str(tmp_path / "two")])
    own = torch.get_rng_state().shape
    for file in two.glob("rng_*.pt"):
        assert all(stream.shape == own for stream in torch.load(file)["tracker"].values())
    assert json.loads((two / "run_state.json").read_text())["layout"]["device"] == "cpu"


@pytest.mark.parametrize(("stage", "layout"), [("0", ""), ("2", ""), ("3", ""), ("1", f"{TP} 2")])
def test_flags_decide_the_optimizers_settings(
    two_ranks: Workers, data: Path, tmp_path: Path, stage: str, layout: str
) -> None:
    """Not the checkpoint, in the same layout or in another."""
    argv = arguments(data, *FIXED, "--no-shapley", "--train-iters", "2", "--zero-stage", stage)
    two_ranks.run(run_here, [*argv, "--save", str(tmp_path / "one")])
    argv += ["--load", str(tmp_path / "one"), "--save", str(tmp_path / "two"), *layout.split()]
    flags = "--adam-beta2 0.5 --adam-eps 1e-6 --weight-decay 0.125 --clip-grad 0.25"
    settings, clip = two_ranks.run(_pass_on, [*argv, *flags.split()])[0]
    assert clip == 0.25
    assert [group["weight_decay"] for group in settings] == [0.125, 0.0]
    assert all((group["betas"], group["eps"]) == ((0.9, 0.5), 1e-6) for group in settings)
    if not layout:
        refusal = refused(two_ranks, [*argv, "--save", str(tmp_path / "three"), "--optimizer", "sgd"])
        assert (
            "holds the state of --optimizer adam, this run has sgd: resume with --optimizer adam" in refusal
        )


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dim", [0, 1])
def test_shards_join_to_what_they_were_cut_from(dim: int, stride: int) -> None:
    whole = torch.randn(8, 8)
    for world in (1, 2, 4):
        shards = [shard(whole, dim, stride, rank, world) for rank in range(world)]
        assert torch.equal(joined(shards, Cut(dim, stride)), whole)
    assert not torch.equal(joined(shards[::-1], Cut(dim, stride)), whole)


def test_the_note_says_what_lies_in_a_file(two_ranks: Workers, data: Path, tmp_path: Path) -> None:
    """Every element of every parameter is in exactly one fragment."""
    flags = [*FIXED, "--no-shapley", "--train-iters", "2", "--zero-stage", "2", "--save", str(tmp_path)]
    two_ranks.run(run_here, arguments(data, *flags))
    notes = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("checkpoints/*/shards_*.json"))]
    assert len(notes) == 2
    found: dict[str, list[tuple[int, int]]] = {}
    for note in notes:
        for piece in note["pieces"]:
            for name, start, _, numel in piece["fragments"]:
                found.setdefault(name, []).append((start, start + numel))
    for name, about in notes[0]["parameters"].items():
        ends = sorted(found[name])
        assert ends[0][0] == 0 and ends[-1][1] == torch.Size(about["shape"]).numel()
        assert all(left[1] == right[0] for left, right in itertools.pairwise(ends))
