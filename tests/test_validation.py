"""The checks before any rank talks: numbers that do not fit, and layouts that would train wrongly."""

from __future__ import annotations

from pathlib import Path

import pytest

from inrun_megatron.errors import UserError
from inrun_megatron.training.deepspeed_config import merge
from inrun_megatron.training.validation import check_fp16, check_pipeline, validate
from tests.flags import config, write_json

EXPERTS = "--disable-bias-linear --num-experts 4"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--seed -4", "--seed is -4: it must be from 0 to 4294967295"),
        ("--seed 4294967296", "--seed is 4294967296"),
        ("--tensor-model-parallel-size 8 --hidden-size 48", "8 does not divide --num-attention-heads 4"),
        (
            "--tensor-model-parallel-size 8 --num-attention-heads 8 --hidden-size 44 --kv-channels 4",
            "--hidden-size 44",
        ),
        ("--tensor-model-parallel-size 2 --ffn-hidden-size 33", "--ffn-hidden-size 33"),
        (
            "--tensor-model-parallel-size 4 --group-query-attention --num-query-groups 2",
            "--num-query-groups 2",
        ),
        ("--tensor-model-parallel-size 2 --sequence-parallel --seq-length 15", "--seq-length.*15"),
        ("--tensor-model-parallel-size 16", "8 ranks are no multiple of --tensor-model-parallel-size 16"),
        ("--moe-router-topk 3", "--moe-router-topk 3 needs --num-experts"),
        ("--num-experts 4", "--num-experts needs --disable-bias-linear"),
        (f"{EXPERTS} --num-experts 0", "--num-experts is 0: it must be positive"),
        (f"{EXPERTS} --moe-router-topk 5", "--moe-router-topk 5 is more than --num-experts 4"),
        (f"{EXPERTS} --moe-router-topk 1", "--moe-router-topk 1 needs --moe-router-pre-softmax"),
        (f"{EXPERTS} --moe-router-topk-scaling-factor 2", "--moe-router-topk-scaling-factor 2.0 needs"),
        (f"{EXPERTS} --moe-shared-expert-gate", "needs --moe-shared-expert-intermediate-size"),
        (f"{EXPERTS} --moe-z-loss-coeff -1", "--moe-z-loss-coeff is -1.0: it must not be negative"),
        (f"{EXPERTS} --tensor-model-parallel-size 2", "needs --sequence-parallel, as in Megatron-LM"),
        (
            f"{EXPERTS} --tensor-model-parallel-size 2 --sequence-parallel --moe-ffn-hidden-size 9",
            "2 does not divide --moe-ffn-hidden-size 9",
        ),
        (
            f"{EXPERTS} --moe-aux-loss-coeff 0.1 --moe-router-load-balancing-type none",
            "--moe-aux-loss-coeff 0.1 with --moe-router-load-balancing-type none: leave one out",
        ),
        ("--sequence-parallel", "--sequence-parallel needs --tensor-model-parallel-size"),
        ("--pipeline-model-parallel-size 0", "--pipeline-model-parallel-size is 0: it must be positive"),
        (
            "--pipeline-model-parallel-size 3",
            "8 ranks are no multiple of --tensor-model-parallel-size 1 x --pipeline-model-parallel-size 3",
        ),
        ("--num-attention-heads 5", "5 does not divide --hidden-size 32"),
        ("--num-query-groups 2", "needs --group-query-attention"),
        ("--group-query-attention --num-query-groups 3", "3 does not divide --num-attention-heads 4"),
        ("--max-position-embeddings 8", "--max-position-embeddings 8 is smaller than --seq-length 16"),
        ("--lr-warmup-iters 10", "10 is not smaller than the 10 steps"),
        ("--lr-warmup-iters 2 --lr-warmup-fraction 0.1", "both given"),
        ("--bf16 --fp16", "choose one"),
        ("--zero-stage 4", "--zero-stage 4 does not exist"),
        ("--hidden-dropout 1", "--hidden-dropout is 1.0"),
        ("--save-interval 5", "needs --save"),
        ("--save-retain-interval 0", "--save-retain-interval is 0: it must be positive"),
        ("--micro-batch-size 0", "--micro-batch-size is 0"),
        ("--shapley-refresh 0", "--shapley-refresh is 0: it must be positive"),
        ("--weight-decay nan", "--weight-decay is nan: it must be a number"),
        ("--clip-grad nan", "--clip-grad is nan: it must be a number"),
        ("--norm-epsilon -1", "--norm-epsilon is -1.0: it must be positive"),
        ("--rotary-base 0", "--rotary-base is 0: it must be positive"),
        (
            "--shapley --shapley-refresh 2 --shapley-estimator simpson",
            "--shapley-refresh 2 with --shapley-estimator simpson: .* leave --shapley-refresh out",
        ),
        ("--shapley", "no --shapley-target"),
        ("--shapley --shapley-target a=b", "--save DIRECTORY or --shapley-dir"),
    ],
)
def test_bad_numbers_are_refused_with_values_and_remedy(flags: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(config(*flags.split()), world_size=8)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--zero-stage 2",
            "ZeRO stage 2 does not work with --pipeline-model-parallel-size 2.*--zero-stage 0 or 1",
        ),
        ("--zero-stage 3", "ZeRO stage 3"),
        ("--zero-stage 0 --bf16", "--bf16 with .* use --zero-stage 1"),
        ("--num-layers 3", "2 does not divide --num-layers 3"),
        ("--shapley --shapley-micro-batch-size 5", "--shapley-micro-batch-size 5 is not --micro-batch-size"),
        ("--recompute-granularity full --recompute-num-layers 2", "--recompute-num-layers 2"),
    ],
)
def test_what_a_pipeline_cannot_do_is_refused(flags: str, message: str) -> None:
    resolved, _, _ = merge(config("--pipeline-model-parallel-size", "2", *flags.split()), 2)
    with pytest.raises(UserError, match=message):
        check_pipeline(resolved)


def test_gradients_that_stay_divided_are_refused(tmp_path: Path) -> None:
    """Scored or not: at ZeRO stage 3 deepspeed 0.19 never undoes a division by the number of replicas."""
    path = write_json(tmp_path / "divided.json", {"gradient_predivide_factor": 2.0})
    flags = ("--no-shapley", "--deepspeed-config", path, "--zero-stage")
    with pytest.raises(
        UserError, match=r'"gradient_predivide_factor" in .* is 2, as are the data-parallel ranks'
    ):
        merge(config(*flags, "3"), 2)
    merge(config(*flags, "3"), 4)
    merge(config(*flags, "2"), 2)


@pytest.mark.parametrize("stages", [1, 2])
def test_fp16_without_a_loss_scale_is_refused(tmp_path: Path, stages: int) -> None:
    """Scored or not: deepspeed 0.19 divides by the scale that it multiplies by from ZeRO stage 1 on only."""
    flags = ("--no-shapley", "--pipeline-model-parallel-size", str(stages))
    json_file = write_json(tmp_path / "fp16.json", {"fp16": {"enabled": True}})
    for fp16 in (("--fp16",), ("--deepspeed-config", json_file)):
        with pytest.raises(UserError, match=r"--fp16 at ZeRO stage 0 .* use --zero-stage 1, 2 or 3"):
            check_fp16(merge(config(*flags, *fp16), 2)[0])
        check_fp16(merge(config(*flags, *fp16, "--zero-stage", "1"), 2)[0])


def test_the_base_point_is_the_drift_where_that_costs_no_flush() -> None:
    def resolved(*flags: str) -> str | None:
        return merge(config(*flags), 1)[0].shapley.base

    stages = ("--pipeline-model-parallel-size", "2")
    assert (resolved(), resolved(*stages)) == ("drift", "current")
    assert resolved(*stages, "--shapley-base", "drift") == "drift"
    assert resolved("--shapley-base", "current") == "current"


@pytest.mark.parametrize("flag", ["--save", "--shapley-dir"])
def test_a_run_directory_cannot_be_or_lie_under_a_file(tmp_path: Path, flag: str) -> None:
    (tmp_path / "file").write_text("")
    for place in ("file", "file/run/here"):
        with pytest.raises(UserError, match=f"{flag} {tmp_path}/{place}: {tmp_path}/file is a file"):
            validate(
                config("--shapley", "--shapley-target", "a=b", flag, str(tmp_path / place)), world_size=1
            )
    validate(config("--shapley-target", "a=b", flag, str(tmp_path / "new" / "run")), world_size=1)


def test_good_numbers_give_the_data_parallel_size() -> None:
    assert validate(config("--tensor-model-parallel-size", "2"), world_size=8) == 4
