"""Command line and YAML to `Config` and back.

`parse(argv)` reads `--config FILE.yaml` first (if given) and lets flags override it. A run writes the same YAML to its
directory, so `pretrain.py --config RUN/config.yaml --save NEW` repeats it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro
import yaml

from inrun_megatron.config import Config
from inrun_megatron.errors import UserError
from inrun_megatron.ledger.files import make_directory, refused, write_atomically
from inrun_megatron.wording import one_line

# Set by the launcher or by how the run was started: they do not describe the run. A replay that loaded would go on from the
# end of the run instead of repeating it.
NOT_REPLAYED = {"parallel": ("local_rank", "deepspeed"), "checkpoint": ("load",)}
_BOX = re.compile(r"[─-╿]+")


def parse(argv: Sequence[str], prog: str = "pretrain.py") -> Config:
    """`Config` from a command line. `--help` prints the help and exits; any mistake is a one-line UserError."""
    config_file, flags = _take_config_file(list(argv))
    default = None if config_file is None else _from_mapping(Config, _read_yaml(config_file), config_file)
    arguments: dict[str, Any] = {} if default is None else {"default": default}
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                Config,
                args=flags,
                prog=prog,
                config=(tyro.conf.OmitArgPrefixes,),
                description=(Config.__doc__ or "") + "\n\nFlags override --config FILE.yaml.",
                **arguments,
            )
    except SystemExit as exit_:
        if exit_.code in (0, None):
            raise
        raise UserError(_one_line(errors.getvalue())) from None


def _take_config_file(argv: list[str]) -> tuple[str | None, list[str]]:
    """Split `--config FILE` (or `--config=FILE`) off a command line."""
    for position, argument in enumerate(argv):
        if argument == "--config":
            if position + 1 == len(argv):
                raise UserError("--config needs the path of a YAML file")
            return argv[position + 1], argv[:position] + argv[position + 2 :]
        if argument.startswith("--config="):
            return argument.removeprefix("--config="), argv[:position] + argv[position + 1 :]
    return None, argv


def _one_line(box: str) -> str:
    """tyro's boxed message as one line: title and help of the flag are left out."""
    lines = [_BOX.sub(" ", line).strip() for line in box.splitlines()]
    title, *message = [line for line in lines if line]
    text = " ".join(message).split("Argument helptext:")[0].split("For full helptext")[0]
    _, _, unrecognised = text.partition("Unrecognized options:")
    unknown = re.findall(r"(?<!\S)--[\w-]+", unrecognised.split("Perhaps you meant:")[0])
    if unknown:
        return f"unknown flag {unknown[0]}{_suggestion(unknown[0])} (see --help)"
    if title == "Required options":
        missing = [flag for line in message for flag in re.findall(r"^--[\w-]+", line)]
        return f"required flags are missing: {', '.join(missing)} (see --help)"
    return f"{re.sub(' +', ' ', text).strip()} (see --help)"


UNSUPPORTED = {
    "--expert-model-parallel-size": "expert parallelism is not supported",
    "--expert-tensor-parallel-size": "experts are split as the other layers are",
    "--moe-grouped-gemm": "grouped products are not supported",
    "--context-parallel-size": "context parallelism is not supported",
    "--moe-token-dispatcher-type": "experts are replicated, and tokens go nowhere",
}
"""Flags of Megatron-LM's that one may look for."""


def _suggestion(unknown: str) -> str:
    if unknown.replace("_", "-") in UNSUPPORTED:
        return f": {UNSUPPORTED[unknown.replace('_', '-')]}"
    flags = [_flag(kind, field) for kind in groups().values() for field in dataclasses.fields(kind)]
    close = difflib.get_close_matches(unknown.replace("_", "-"), flags, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def groups() -> dict[str, Any]:
    """Name and dataclass of each group of flags."""
    return typing.get_type_hints(Config)


def _flag(kind: type, field: dataclasses.Field[Any]) -> str:
    """A field's flag."""
    names = _settings(kind, field, "name")
    return "--" + (names[0] if names else field.name.replace("_", "-"))


def _form(kind: type, field: dataclasses.Field[Any]) -> list[str]:
    """What a field's flag takes, where that is a form of its own or one of several words."""
    hint = typing.get_type_hints(kind)[field.name]
    kinds = [hint, *typing.get_args(hint)]  # of an optional one, what it may be
    words = [
        word for own in kinds if typing.get_origin(own) is typing.Literal for word in typing.get_args(own)
    ]
    return [f"{{{','.join(words)}}}"] if words else _settings(kind, field, "metavar")


def _settings(kind: type, field: dataclasses.Field[Any], name: str) -> list[str]:
    """What a field's annotations set ``name`` to."""
    hint = typing.get_type_hints(kind, include_extras=True)[field.name]
    return [value for setting in getattr(hint, "__metadata__", ()) if (value := getattr(setting, name, None))]


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {path} is not YAML: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"--config {path} holds no mapping of configuration groups")
    return content


def _from_mapping(kind: type, content: dict[str, Any], path: str) -> Any:
    """An instance of the dataclass `kind`; what `content` leaves out has its default or must come as a flag."""
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(set(content) - set(fields))
    if unknown:
        raise UserError(f"--config {path}: {kind.__name__} has no field {', '.join(map(repr, unknown))}")
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if dataclasses.is_dataclass(hints[name]):
            group = content.get(name) or {}
            if not isinstance(group, dict):
                raise UserError(f"--config {path}: {name} must be a mapping, not {group!r}")
            values[name] = _from_mapping(typing.cast(type, hints[name]), group, path)
        elif name in content:
            values[name] = _converted(content[name], hints[name], f"--config {path}: {name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            values[name] = tyro.MISSING
    return kind(**values)


def _converted(value: Any, hint: Any, where: str) -> Any:
    """A YAML value as the field's type. YAML reads `1e-3` as text and `1` as an integer; a float field takes both."""
    alternatives = (
        typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    )
    for kind in alternatives:
        if typing.get_origin(kind) is typing.Literal:
            if value in typing.get_args(kind):
                return value
        elif typing.get_origin(kind) is tuple:
            if isinstance(value, list):
                return tuple(map(str, value))
        elif kind is float and not isinstance(value, bool):
            with contextlib.suppress(TypeError, ValueError):
                return float(value)
        elif type(value) is kind:
            return value
    expected = getattr(hint, "__name__", None) or str(hint)
    raise UserError(f"{where} is {value!r}, not {expected.replace('typing.', '')}")


def to_mapping(config: Config) -> dict[str, Any]:
    """The configuration as plain mappings and lists, without what does not describe the run."""
    mapping = dataclasses.asdict(config)
    for group, names in NOT_REPLAYED.items():
        for name in names:
            del mapping[group][name]
    return {
        group: {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
        for group, fields in mapping.items()
    }


def write_yaml(config: Config, path: Path) -> None:
    """Write the replayable configuration; the file is replaced in one step. UserError when the file system refuses."""
    text = "# Repeat this run: pretrain.py --config <this file> --save <another directory>\n"
    text += yaml.safe_dump(to_mapping(config), sort_keys=False)
    try:
        make_directory(path.parent)
    except OSError as error:
        raise refused(path, error) from error
    write_atomically(path, text.encode())


def flags_markdown() -> str:
    """All flags as the Markdown tables of docs/flags.md."""
    lines = [
        "# Flags of launch/pretrain.py",
        "",
        "Written by `python -m inrun_megatron.training.arguments`; do not edit. Underscores and hyphens are the same; "
        "a switch `--name` has an opposite `--no-name`. `--config FILE.yaml` is read first, flags override it.",
        "",
        "A run writes its resolved flags to RUN/config.yaml, all but `--load`: `--config RUN/config.yaml --save NEW` repeats "
        "it from the beginning, `--config RUN/config.yaml --load RUN` goes on from its last checkpoint.",
        "",
    ]
    from tyro._docstrings import get_field_docstring

    for group, kind in groups().items():
        lines += [
            f"## {group}",
            "",
            (kind.__doc__ or "").strip(),
            "",
            "| flag | default | meaning |",
            "|---|---|---|",
        ]
        for field in dataclasses.fields(kind):
            required = field.default is dataclasses.MISSING
            default = (
                "required" if required else f"`{field.default}`" if field.default not in (None, ()) else ""
            )
            meaning = " ".join((get_field_docstring(kind, field.name, ()) or "").split())
            lines.append(
                f"| `{' '.join([_flag(kind, field), *_form(kind, field)])}` | {default} | {meaning} |"
            )
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(flags_markdown())
