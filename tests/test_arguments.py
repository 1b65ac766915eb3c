"""Command line and YAML: flags, mistakes in them, help, and docs/flags.md."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import pytest
import yaml
from tyro._docstrings import get_field_docstring

from inrun_megatron.errors import UserError
from inrun_megatron.training.arguments import flags_markdown, groups, parse, to_mapping, write_yaml
from tests.flags import BASE, config

ROOT = Path(__file__).resolve().parents[1]


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
        (["--moe_grouped_gemm"], "^unknown flag --moe_grouped_gemm: grouped products are not supported"),
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
    for kind in groups().values():
        for field in dataclasses.fields(kind):
            assert "\n" not in (get_field_docstring(kind, field.name, ()) or ""), field.name


def test_a_misspelt_required_flag_is_unknown_and_not_missing() -> None:
    misspelt = ["--hiden_size" if flag == "--hidden-size" else flag for flag in BASE]
    with pytest.raises(UserError, match=r"^unknown flag --hiden_size; did you mean --hidden-size\?"):
        parse(misspelt)
    with pytest.raises(UserError, match=r"^required flags are missing: --num-layers, --hidden-size"):
        parse(BASE[4:])


def test_the_flags_document_is_current() -> None:
    text = flags_markdown()
    assert (ROOT / "docs" / "flags.md").read_text() == text + "\n", (
        "run python -m inrun_megatron.training.arguments"
    )
    assert "`--shapley-target NAME=PATH[:SEQUENCES]`" in text and "`--shapley-base {current,drift}`" in text
    for group, fields in yaml.safe_load(yaml.safe_dump(to_mapping(config()))).items():
        assert f"## {group}" in text
        assert all(f"{name.replace('_', '-')}" in text for name in fields if name != "enabled")
