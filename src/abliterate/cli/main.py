"""The command line: its verbs, and the one place where an error of ours becomes a message and an exit code."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from abliterate.cli import bench, collect, compare, edit, evaluate, export, inspect, report, resist, run, select, undo
from abliterate.cli.console import INTERRUPTED, tell
from abliterate.errors import AbliterateError

app = typer.Typer(
    name="abliterate",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="[bold]Example[/bold]\n\n  abliterate run demo -o demo-abliterated",
)
app.command(epilog=run.EPILOG)(run.run)
app.command(epilog=collect.EPILOG)(collect.collect)
app.command(epilog=select.EPILOG)(select.select)
app.command(epilog=edit.EPILOG)(edit.edit)
app.command(epilog=inspect.EPILOG)(inspect.inspect)
app.command(epilog=undo.EPILOG)(undo.undo)
app.command(epilog=compare.EPILOG)(compare.compare)
app.command("eval", epilog=evaluate.EPILOG)(evaluate.evaluate)
app.command(epilog=bench.EPILOG)(bench.bench)
app.command(epilog=resist.EPILOG)(resist.resist)
app.command(epilog=report.EPILOG)(report.report)
app.command(epilog=export.EPILOG)(export.export)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"abliterate {version('abliterate')}")
        raise typer.Exit


@app.callback()
def _root(
    _v: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """Find the refusal direction of an open-weight chat model, project it out of the weights, measure what changed.

    `abliterate --model MODEL --output OUT` is short for `abliterate run MODEL -o OUT`.
    """


def main(argv: list[str] | None = None) -> None:
    """Run the command line; a user's mistake ends in one message and its exit code."""
    args = sys.argv[1:] if argv is None else argv
    if "OMP_WAIT_POLICY" not in os.environ:
        # Threads that spin for long while they wait take the cores from other work: two runs at once would crawl.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # `abliterate --model M --output O`: no verb, and an option that only `run` has.
    if args and args[0].startswith("-") and any(a.split("=")[0] in ("--model", "--output", "-o") for a in args):
        args = ["run", *args]
    try:
        app(args=args)
    except KeyboardInterrupt:
        tell("interrupted")
        raise SystemExit(INTERRUPTED) from None
    except AbliterateError as error:
        tell(str(error), "error: ")
        raise SystemExit(error.exit_code) from None
