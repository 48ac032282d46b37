"""`abliterate export`: directions for other programs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Optional

import typer

from abliterate.cli import console, options
from abliterate.envelope import enveloped
from abliterate.report.layout import say

EPILOG = """
[bold]Examples[/bold]

  abliterate export demo-abliterated -o refusal.gguf

  abliterate export mine.npy -o mine.gguf --layer 14 --scale 8
"""


def export(
    directions: Annotated[
        Path,
        typer.Argument(metavar="DIRECTIONS", help="What select wrote, the result of a run, or a .npy."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to create.", metavar="FILE.gguf")],
    output_format: Annotated[
        str, typer.Option("--format", metavar="control-vector", help="What FILE is: a control vector of llama.cpp.")
    ] = "control-vector",
    layer: Annotated[
        Optional[int],
        typer.Option(help="Add it behind this layer (from 1).", show_default="where the direction was found"),
    ] = None,
    scale: Annotated[
        Optional[float],
        typer.Option(help="The length of what is added.", show_default="the gap between both prompt sets there"),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Write DIRECTIONS as a control vector, which llama.cpp adds to the residual stream of a model as it runs.

    Scale 1 moves the mean of harmless prompts to that of harmful ones, -1 that of harmful ones to that of harmless.

    Every token is moved by the same constant, whatever it has along the direction: that is no projection.
    """
    from abliterate.export import export as export_verb

    found = export_verb(directions, output, format=output_format, layer=layer, scale=scale)
    if as_json:
        console.print_json(enveloped("exported", asdict(found)))
        return
    vectors = ", ".join(f"a vector of length {v['length']:.4g} behind layer {v['layer']}" for v in found.vectors)
    say(console.stdout(), f"{found.output}: adds {vectors}, times the scale that llama.cpp is given")
