"""The `inrun` command. Bad input of any kind ends as one line on stderr and exit code 1."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from inrun_megatron.commands.compare import compare
from inrun_megatron.commands.curate import curate
from inrun_megatron.commands.export import export
from inrun_megatron.commands.plan import plan
from inrun_megatron.commands.prepare import prepare
from inrun_megatron.commands.report import report
from inrun_megatron.commands.show import show
from inrun_megatron.commands.summary import summary
from inrun_megatron.commands.top import top
from inrun_megatron.commands.verify import verify
from inrun_megatron.data.prepare import package_version
from inrun_megatron.errors import UserError

app = typer.Typer(
    name="inrun",
    help="In-Run Data Shapley: prepare data, and read the values of a run's training samples.",
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (prepare, summary, report, top, show, export, compare, curate, plan, verify):
    app.command()(_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"inrun-megatron {package_version()}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `inrun` with `arguments` (default: the process's) and exit."""
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Text from the data may hold what a terminal that is not UTF-8 has no sign for.
        sys.stdout.reconfigure(errors="replace")
    command = given[0] if given and not given[0].startswith("-") else None
    name = f"inrun {command}" if command else "inrun"
    try:
        code = app(given, prog_name="inrun", standalone_mode=False)
    except UserError as error:
        code = _complain(name, str(error))
    except typer.Abort:
        code = _complain(name, "aborted")
    except BrokenPipeError:
        # The reader (head, less) has seen enough; without this Python complains while it flushes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        # What no command foresees: a folder that may not be read, a full disk for temporary files, a name too long.
        code = _complain(name, f"{error.filename or 'the system'}: {error.strerror or error}")
    except Exception as error:
        # What typer raises on a bad command line; its class has moved between releases, its method has not.
        if not hasattr(error, "format_message"):
            raise
        message = error.format_message() or f"no command given; see {name} --help"
        if message.startswith("No such command"):
            name, message = "inrun", f"{message.rstrip('.')}; see inrun --help"
        # Of the library that typer converts values with.
        code = _complain(name, message.replace("Value error, ", ""))
    sys.exit(code if isinstance(code, int) else 0)


def _complain(name: str, message: str) -> int:
    print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    main()
