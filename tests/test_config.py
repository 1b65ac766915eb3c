"""Command line, YAML, DeepSpeed JSON and the checks before any rank talks."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path

import pytest
import yaml
from tyro._docstrings import get_field_docstring

from inrun_megatron.config import Config
from inrun_megatron.errors import UserError
from inrun_megatron.training.arguments import _groups, flags_markdown, parse, to_mapping, write_yaml
from inrun_megatron.training.deepspeed_config import merge
from inrun_megatron.training.validation import check_fp16, check_pipeline, validate

ROOT = Path(__file__).resolve().parents[1]
BASE = shlex.split(
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --data-path a "
    "--micro-batch-size 2 --train-iters 10 --lr 1e-3 --no-shapley"
)


def config(*flags: str) -> Config:
    return parse([*BASE, *flags])


def write_json(path: Path, content: object) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def test_flags_have_megatron_names() -> None:
    run = config(
        *shlex.split(
            "--tensor-model-parallel-size 2 --sequence-parallel --swiglu --normalization RMSNorm "
            "--group-query-attention --num-query-groups 2 --untie-embeddings-and-output-weights --disable-bias-linear "
            "--position-embedding-type rope --global-batch-size 16 --clip-grad 0.5 --bf16 "
            "--data-path 0.7 a_document 0.3 b_document --deepspeed --deepspeed_config x.json --local_rank=1"
        )
    )
    assert run.parallel.tensor_model_parallel_size == 2 and run.parallel.sequence_parallel
    assert run.parallel.local_rank == 1 and run.parallel.deepspeed_config == "x.json"
    assert run.data.data_path == ("0.7", "a_document", "0.3", "b_document")
    assert run.model.query_groups == 2 and run.model.swiglu
    assert run.training.bf16 and run.training.clip_grad == 0.5


def test_targets_are_repeatable_and_scoring_can_be_switched_off() -> None:
    run = parse(
        [*BASE[:-1], "--shapley-target", "code=c:32", "--shapley-target=prose=p", "--shapley-interval", "5"]
    )
    assert (
        run.shapley.enabled and run.shapley.target == ("code=c:32", "prose=p") and run.shapley.interval == 5
    )
    assert not config().shapley.enabled


def test_yaml_replays_a_run_and_flags_override_it(tmp_path: Path) -> None:
    run = parse(
        [*BASE, "--shapley-target", "code=c:32", "--sequence-parallel", "--local_rank=3", "--load", "r"]
    )
    write_yaml(run, tmp_path / "run" / "config.yaml")
    path = str(tmp_path / "run" / "config.yaml")
    replayed = parse(["--config", path])
    assert to_mapping(replayed) == to_mapping(run)
    assert replayed.parallel.local_rank == -1  # the launcher's, not the run's
    assert replayed.checkpoint.load is None  # it would go on from the end of the run
    assert parse(["--config", path, "--load", "r"]).checkpoint.load == "r"
    changed = parse([f"--config={path}", "--lr", "0.5", "--no-sequence-parallel"])
    assert changed.training.lr == 0.5 and not changed.parallel.sequence_parallel
    assert dataclasses.replace(changed.training, lr=run.training.lr) == run.training


def test_a_yaml_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "run" / "config.yaml").mkdir(parents=True)
    for path in (tmp_path / "file" / "run" / "config.yaml", tmp_path / "run" / "config.yaml"):
        with pytest.raises(UserError, match=f"cannot write {path}: "):
            write_yaml(parse(BASE), path)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]  # no temporary file


def test_yaml_may_be_partial_and_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "part.yaml"
    path.write_text("training: {lr: 1e-3, micro_batch_size: 4, train_iters: 5}\nmodel: {num_layers: 3}\n")
    flags = shlex.split("--hidden-size 8 --num-attention-heads 2 --seq-length 4 --data-path a")
    run = parse(["--config", str(path), *flags])
    assert run.training.lr == 1e-3 and run.model.num_layers == 3  # YAML reads 1e-3 as text
    with pytest.raises(UserError, match="required flags are missing: --hidden-size"):
        parse(["--config", str(path)])
    for content, message in (
        ("training: {learning_rate: 1}", "TrainingConfig has no field 'learning_rate'"),
        ("model: {num_layers: two}", "num_layers is 'two', not int"),
        ("model: {num_layers: true}", "num_layers is True, not int"),
        ("training: [", "is not YAML"),
        ("- 1", "no mapping"),
        (b"\xff\xfe", "is not YAML: 'utf-8' codec"),
    ):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(UserError, match=message):
            parse(["--config", str(path), *flags])
    with pytest.raises(UserError, match="No such file"):
        parse(["--config", str(tmp_path / "none.yaml")])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-layrs", "3"], "^unknown flag --num-layrs; did you mean --num-layers[?] .see --help.$"),
        (["--shapley-intervall=3"], "unknown flag --shapley-intervall; did you mean --shapley-interval[?]"),
        (["--zzz"], "^unknown flag --zzz .see --help.$"),
        (["--lr", "1", "2"], "Unrecognized options: 2"),
        (["--lr", "fast"], "--lr.*'fast'"),
        (["--normalization", "BatchNorm"], "'BatchNorm'.*LayerNorm.*RMSNorm"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        config(*flags)
    assert "\n" not in str(caught.value) and "│" not in str(caught.value)


def test_help_states_defaults_in_words_or_as_values(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    assert "(default: adam)" in text and "Default: --train-iters." in text and "default: None" not in text


def test_help_breaks_lines_only_where_they_are_full() -> None:
    for kind in _groups().values():
        for field in dataclasses.fields(kind):
            assert "\n" not in (get_field_docstring(kind, field.name, ()) or ""), field.name


def test_a_misspelt_required_flag_is_unknown_and_not_missing() -> None:
    misspelt = ["--hiden_size" if flag == "--hidden-size" else flag for flag in BASE]
    with pytest.raises(UserError, match=r"^unknown flag --hiden_size; did you mean --hidden-size\?"):
        parse(misspelt)
    with pytest.raises(UserError, match=r"^required flags are missing: --num-layers, --hidden-size"):
        parse(BASE[4:])


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
    settled, _, _ = merge(config("--pipeline-model-parallel-size", "2", *flags.split()), 2)
    with pytest.raises(UserError, match=message):
        check_pipeline(settled)


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
    def settled(*flags: str) -> str | None:
        return merge(config(*flags), 1)[0].shapley.base

    stages = ("--pipeline-model-parallel-size", "2")
    assert (settled(), settled(*stages)) == ("drift", "current")
    assert settled(*stages, "--shapley-base", "drift") == "drift"
    assert settled("--shapley-base", "current") == "current"


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


def test_auto_values_are_filled_from_the_flags(tmp_path: Path) -> None:
    path = write_json(
        tmp_path / "auto.json",
        {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "train_batch_size": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": "auto"},
            "zero_optimization": {"stage": "auto", "reduce_bucket_size": 1000},
        },
    )
    run, merged, batch = merge(
        config("--deepspeed_config", path, "--global-batch-size", "16", "--zero-stage", "2", "--bf16"), 2
    )
    assert (batch.micro, batch.accumulation, batch.data_parallel, batch.size) == (2, 4, 2, 16)
    assert merged["train_micro_batch_size_per_gpu"] == 2 and merged["gradient_accumulation_steps"] == 4
    assert merged["train_batch_size"] == 16 and merged["gradient_clipping"] == 1.0
    assert merged["bf16"]["enabled"] is True and merged["fp16"]["enabled"] is False
    assert merged["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000}
    assert run.training.global_batch_size == 16 and run.training.clip_grad == 1.0
    # What is settled settles to itself: a replayed run means the same.
    again, merged_again, _ = merge(run, 2)
    assert again == run and merged_again == merged


def test_the_json_decides_what_the_flags_leave_open(tmp_path: Path) -> None:
    path = write_json(
        tmp_path / "x.json",
        {"gradient_clipping": 0.25, "bf16": {"enabled": True}, "zero_optimization": {"stage": 3}},
    )
    run, merged, _ = merge(config("--deepspeed_config", path), 1)
    assert run.training.clip_grad == 0.25 and run.training.bf16 and run.parallel.zero_stage == 3
    assert merged["zero_optimization"]["stage"] == 3


@pytest.mark.parametrize(
    ("flags", "content", "values"),
    [
        ("--zero-stage 1", {"zero_optimization": {"stage": 2}}, ("--zero-stage is 1", "x.json is 2")),
        ("", {"train_micro_batch_size_per_gpu": 4}, ("--micro-batch-size is 2", "is 4")),
        ("--global-batch-size 8", {"gradient_accumulation_steps": 3}, ("--global-batch-size 8", "is 3")),
        ("", {"train_batch_size": 64}, ("--global-batch-size is 4", "is 64")),
        ("--clip-grad 1.0", {"gradient_clipping": 0.5}, ("--clip-grad is 1.0", "is 0.5")),
        ("--bf16", {"bf16": {"enabled": False}}, ("--bf16 is True", "is false")),
        ("--fp16 --loss-scale 128", {"fp16": {"loss_scale": 64}}, ("--loss-scale is 128.0", "is 64")),
        (
            "--tensorboard-dir mine",
            {"tensorboard": {"enabled": True, "output_path": "theirs"}},
            ("--tensorboard-dir is mine", '"tensorboard.output_path" in', 'is "theirs"'),
        ),
        ("--csv-dir mine", {"csv_monitor": {"enabled": False}}, ("--csv-dir", "is false")),
        ("--wandb-project mine", {"wandb": {"project": "theirs"}}, ("--wandb-project is mine", "theirs")),
    ],
)
def test_a_contradiction_names_both_values(
    tmp_path: Path, flags: str, content: dict, values: tuple[str, str]
) -> None:
    path = write_json(tmp_path / "x.json", content)
    with pytest.raises(UserError) as caught:
        merge(config("--deepspeed_config", path, *flags.split()), 2)
    assert all(value in str(caught.value) for value in values), str(caught.value)


def test_a_monitor_of_the_flags_keeps_what_the_json_says_of_it(tmp_path: Path) -> None:
    """Such as the team, which no flag names."""
    content = {"wandb": {"enabled": True, "team": "us", "project": "p"}, "csv_monitor": {"job_name": "mine"}}
    path = write_json(tmp_path / "x.json", content)
    flags = "--wandb-project p --wandb-exp-name e --csv-dir c --tensorboard-dir t"
    _, merged, _ = merge(config("--deepspeed_config", path, *flags.split()), 1)
    assert merged["wandb"] == {"enabled": True, "team": "us", "project": "p", "group": "e"}
    assert merged["csv_monitor"] == {"enabled": True, "output_path": "c", "job_name": "mine"}
    assert merged["tensorboard"] == {"enabled": True, "output_path": "t", "job_name": "train"}


@pytest.mark.parametrize(
    ("flags", "content", "message"),
    [
        ("--wandb-exp-name e", {}, "--wandb-exp-name e needs --wandb-project"),
        ("--global-batch-size 6", {}, "6 is no multiple of --micro-batch-size 2 x 2 data-parallel ranks = 4"),
        ("--fp16", {"bf16": {"enabled": True}}, "both bf16 and fp16"),
        ("", {"optimizer": {"type": "Adam"}}, "give --optimizer"),
        (
            "",
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}},
            "zero_optimization.reduce_bucket_size",
        ),
        ("--loss-scale 2", {}, "needs --fp16"),
        ("--fp16 --initial-loss-scale 100", {}, "100.0 is no power of 2"),
        ("--fp16 --initial-loss-scale inf", {}, "inf is no power of 2"),
        ("--fp16 --loss-scale inf", {}, "--loss-scale is inf: it must be positive and finite"),
        ("--fp16", {"fp16": {"enabled": True, "loss_scale_window": 0}}, "--loss-scale-window is 0: it must"),
        ("", {"gradient_clipping": "abc"}, '"gradient_clipping" in .*x.json is "abc": write a number'),
        ("", {"bf16": {"enabled": "yes"}}, '"bf16.enabled" in .*x.json is "yes": write true or false'),
        ("", {"zero_optimization": {"stage": True}}, "is true: write a number"),
        ("--fp16", {"fp16": {"hysteresis": [2]}}, "write a number"),
        ("", {"checkpoint": {"writer": {"decoupled": True}}}, "checkpoint.writer.decoupled.* remove it"),
        ("", {"checkpoint": {"checkpoint_serialization": False}}, "checkpoint_serialization.* remove it"),
        ("", {"datastates_ckpt": {}}, "datastates_ckpt.* remove it"),
        ("", {"managed_gradient_accumulation": False}, "every microbatch would be an optimizer step"),
        ("", {"bfloat16": {"enabled": True}}, 'write "bf16"'),
        ("", {"zero_optimization": {"stage": 2, "cpu_offload": True}}, 'write "offload_optimizer"'),
        ("", {"data_efficiency": {"enabled": True}}, "data_efficiency.* would be ignored"),
        ("", {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, 'torch_autocast.* use "bf16"'),
        (
            "--pipeline-model-parallel-size 2",
            {"pipeline": {"activation_checkpoint_interval": 1}},
            "activation_checkpoint_interval.* is 1: .* give --recompute-granularity full",
        ),
    ],
)
def test_impossible_settings_are_refused(tmp_path: Path, flags: str, content: dict, message: str) -> None:
    path = write_json(tmp_path / "x.json", content)
    with pytest.raises(UserError, match=message):
        merge(config("--deepspeed_config", path, *flags.split()), 2)


def test_a_broken_json_is_refused(tmp_path: Path) -> None:
    for content in (b"{", b"\xff\xfe"):
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(UserError, match="is not JSON"):
            merge(config("--deepspeed_config", str(tmp_path / "x.json")), 1)
    with pytest.raises(UserError, match="No such file"):
        merge(config("--deepspeed_config", str(tmp_path / "y.json")), 1)


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_shipped_deepspeed_configurations_settle(path: Path) -> None:
    run, merged, _ = merge(config("--deepspeed_config", str(path)), 2)
    stage = int(path.stem[-1]) if path.stem.startswith("zero") else {"offload": 2}.get(path.stem, 0)
    assert merged["zero_optimization"]["stage"] == run.parallel.zero_stage == stage
    assert run.training.bf16 == (path.stem == "bf16") and run.training.fp16 == (path.stem == "fp16")
    assert "auto" not in json.dumps(merged)


def test_the_flags_document_is_current() -> None:
    text = flags_markdown()
    assert (ROOT / "docs" / "flags.md").read_text() == text + "\n", (
        "run python -m inrun_megatron.training.arguments"
    )
    assert "`--shapley-target NAME=PATH[:SEQUENCES]`" in text and "`--shapley-base {current,drift}`" in text
    for group, fields in yaml.safe_load(yaml.safe_dump(to_mapping(config()))).items():
        assert f"## {group}" in text
        assert all(f"{name.replace('_', '-')}" in text for name in fields if name != "enabled")
