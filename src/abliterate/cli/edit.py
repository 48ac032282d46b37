"""`abliterate edit`: steps 3 and 4 alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from abliterate.cli import console, options

EPILOG = """
[bold]Examples[/bold]

  abliterate edit demo demo.safetensors -o demo-abliterated

  abliterate edit ./my-model direction.safetensors -o weaker --strength 0.6 --embeddings keep
"""


def edit(
    model: options.Model,
    direction: Annotated[Path, typer.Argument(metavar="DIRECTION", help="A file that select wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to create.", metavar="OUT")],
    strength: options.Strength = 1.0,
    embeddings: options.Embeddings = "edit",
    as_json: options.Json = False,
) -> None:
    """Steps 3 and 4: project DIRECTION out of every weight of MODEL that writes to the residual stream; save OUT.

    Needs no memory for the model: weights are rewritten a few rows at a time. OUT appears when it is complete.
    """
    from abliterate.report.table import print_run
    from abliterate.verbs import edit as edit_verb

    with console.progress_bars() as steps:
        record = edit_verb(model, direction, output, steps=steps, strength=strength, embeddings=embeddings)
    if as_json:
        console.print_json(record.as_dict)
    else:
        print_run(console.stdout(), record, str(output))
