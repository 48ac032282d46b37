"""`abliterate report`: the page and the model card of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from abliterate.cli import console, options
from abliterate.envelope import enveloped

EPILOG = """
[bold]Examples[/bold]

  abliterate report demo-abliterated

  abliterate report demo-abliterated --md

  abliterate report out.partial -o so-far.html
"""


def report(
    run: Annotated[
        Path,
        typer.Argument(help="What run or edit wrote, its run.json, or OUT.partial.", metavar="RUN"),
    ],
    md: Annotated[bool, typer.Option("--md", help="Print the model card instead, as Markdown.")] = False,
    output: Annotated[Optional[Path], typer.Option("--output", "-o", help="Write to FILE.", metavar="FILE")] = None,
    as_json: options.Json = False,
) -> None:
    """Say where the page of RUN is, and write it if it is missing: what was done, and every figure as a chart.

    The page is one file that opens without a network. An interrupted run has one too, of what is finished.
    """
    from abliterate.results import card
    from abliterate.results import report as report_verb

    if md:
        text = card(run, output)
        if as_json:
            console.print_json(enveloped("card", {"output": None if output is None else str(output), "card": text}))
        elif output is None:
            print(text, end="")
        else:
            print(output)
        return
    path = report_verb(run, output)
    if as_json:
        console.print_json(enveloped("page", {"page": str(path)}))
    else:
        print(path)
