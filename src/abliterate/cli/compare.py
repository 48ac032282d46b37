"""`abliterate compare`: what differs between two checkpoints, and along which direction."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from abliterate.cli import console, options

EPILOG = """
[bold]Examples[/bold]

  abliterate compare demo demo-abliterated --direction demo-abliterated

  abliterate compare org/model someone/model-abliterated --save theirs.safetensors --json
"""


def compare(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model as it was: folder, GGUF, hub id or demo.")],
    other: Annotated[str, typer.Argument(metavar="OTHER", help="What was made of it, by any tool.")],
    direction: Annotated[
        Optional[Path],
        typer.Option("--direction", "-d", metavar="FILE", help="How near is the shared direction to those in FILE?"),
    ] = None,
    save: Annotated[
        Optional[Path],
        typer.Option("--save", metavar="FILE", help="Write the shared direction, for edit --direction."),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """What differs between BASE and OTHER: tensors, the direction that their changes share, settings, template.

    Runs nothing. Rank is that of a change beyond the rounding of its storage type; strength 1 means that what BASE
    has along the shared direction is gone in OTHER.

    Two GGUFs can be compared, not a GGUF with a folder. Codes of block types bend the shared direction (cosine 0.94
    instead of 1.00 on one model), and hide a second one of less than 40% of its size.
    """
    from abliterate.at_rest import compare as compare_verb
    from abliterate.report.comparison import print_comparison

    with console.progress_bars() as steps:
        found = compare_verb(base, other, direction=direction, save=save, steps=steps)
    if as_json:
        console.print_json(found.as_dict)
    else:
        print_comparison(console.stdout(), found.as_dict)
