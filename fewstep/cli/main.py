"""`fewstep COMMAND ...`: the table of commands, and what becomes of an error.

Exit codes: 0; 2 for bad input (options, recipes, folders); 1 for a run that failed. An error is one line on stderr;
`--debug`, before or after the command, adds the traceback. Only typer is imported here: `--help` must come at once.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from .. import __version__
from .answers import process
from .arguments import tidy
from .compare import compare
from .convert import convert
from .demo import demo
from .doctor import doctor
from .evaluate import evaluate
from .export import export
from .methods import methods
from .plan import plan
from .report import report
from .sample import sample
from .train import train

COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "train": train,
    "sample": sample,
    "evaluate": evaluate,
    "compare": compare,
    "export": export,
    "convert": convert,
    "plan": plan,
    "doctor": doctor,
    "methods": methods,
    "report": report,
}
app = typer.Typer(
    name="fewstep",
    add_completion=False,
    rich_markup_mode=None,  # rich is imported by what prints tables, not for `--help`
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for name, function in COMMANDS.items():
    app.command(name)(function)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"fewstep {__version__}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
]


@app.callback()
def options(
    version: Version = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; also allowed after the command.")] = False,
) -> None:
    """Distil diffusion, flow and language models into few-step students.

    First look: `fewstep demo --out runs/demo`. Any recipe: `fewstep train configs/decoupled_dmd/digits.yaml`.
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (default: the process's own) and returns its exit code; nothing is raised."""
    words = tidy(sys.argv[1:] if argv is None else argv)
    try:
        code = app(words or ["--help"], prog_name="fewstep", standalone_mode=False)
    except (Exception, KeyboardInterrupt) as error:
        return _failed(error, words)
    return _interrupted() if code == 130 else int(code or 0)


def _failed(error: BaseException, words: Sequence[str]) -> int:
    if "--debug" in words[:1]:
        traceback.print_exception(error)
    if isinstance(error, typer.Abort | KeyboardInterrupt):
        return _interrupted()
    # UserError, RunFailed and typer's usage errors know their exit codes; anything else is a mistake of ours
    code: Any = getattr(error, "exit_code", None)
    if code is None:
        _complain(f"unexpected {type(error).__name__}: {_first_line(str(error))}; rerun with --debug")
        return 1
    _complain(_usage(error) if hasattr(error, "format_message") else str(error))
    return int(code)


def _usage(error: Any) -> str:
    """A usage error in typer's words, and where to read on."""
    context = getattr(error, "ctx", None)
    words = error.format_message().strip().rstrip(".")
    return f"{words}: see `{context.command_path} --help`" if context is not None else words


def _interrupted() -> int:
    _complain("interrupted")
    return 1


def _complain(what: str) -> None:
    who = f" (process {process()})" if process() else ""
    sys.stderr.write(f"error{who}: {' '.join(what.split())}\n")  # in one piece: several processes may complain at once


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "no message"
