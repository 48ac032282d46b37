"""`abliterate undo`: the base back."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from abliterate.cli import console, options
from abliterate.envelope import enveloped
from abliterate.report.layout import say

EPILOG = """
[bold]Examples[/bold]

  abliterate undo demo-abliterated -o demo-base

  abliterate undo edited.gguf -o base.gguf
"""


def undo(
    edited: Annotated[str, typer.Argument(metavar="EDITED", help="What run or edit wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to create, or GGUF.", metavar="OUT")],
    as_json: options.Json = False,
) -> None:
    """Restore the base of EDITED bit for bit into OUT, from what the edit kept beside the weights.

    Needs neither the base nor memory for the model; every restored tensor is checked by its hash.

    What was not edited is copied as it is: an edit does not read it, and so knows no hash of it.
    """
    from abliterate.at_rest import undo as undo_verb

    with console.progress_bars() as steps:
        restored = undo_verb(edited, output, steps=steps)
    if as_json:
        console.print_json(enveloped("restored", asdict(restored)))
    else:
        say(
            console.stdout(),
            f"{restored.output}: the base; {restored.tensors} edited tensors restored and checked by their hashes in "
            f"{restored.seconds:.0f} s, all others copied from {edited} as they are there",
        )
