"""`abliterate select`: step 2 alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from abliterate.cli import console, options
from abliterate.envelope import enveloped

EPILOG = """
[bold]Examples[/bold]

  abliterate select demo demo-activations -o demo.safetensors

  abliterate select ./my-model acts -o direction.safetensors --layer 14 --position -1
"""


def select(
    model: options.Model,
    activations: Annotated[Path, typer.Argument(metavar="ACTIVATIONS", help="A folder that collect wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to create.", metavar="FILE")],
    layer: options.Layer = None,
    position: options.Position = None,
    method: options.Method = "projected",
    directions: options.Directions = 1,
    strength: options.Strength = 1.0,
    max_kl: options.MaxKl = options.DEFAULT.max_kl,
    embeddings: options.Embeddings = "edit",
    device: options.Device = None,
    dtype: options.Dtype = None,
    memory: options.Memory = None,
    batch_size: options.BatchSize = options.DEFAULT.batch_size,
    as_json: options.Json = False,
) -> None:
    """Step 2: choose the direction among the differences of means in ACTIVATIONS, by causal test on MODEL.

    Uses the validation prompts of the sets that collect was given. FILE holds a unit vector, or with --directions
    orthonormal ones, and how it was found.
    """
    from abliterate.report.table import print_direction
    from abliterate.verbs import select as select_verb

    with console.progress_bars() as steps:
        found = select_verb(
            model, activations, output, steps=steps, layer=layer, position=position, method=method,
            directions=directions,
            strength=strength, max_kl=max_kl, embeddings=embeddings, device=device, dtype=dtype, memory=memory,
            batch_size=batch_size,
        )  # fmt: skip
    if as_json:
        console.print_json(enveloped("direction", {"output": str(output), **found.where}))
    else:
        print_direction(console.stdout(), found.where, max_kl)
