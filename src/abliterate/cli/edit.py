"""`abliterate edit`: steps 3 and 4 alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from abliterate.cli import console, options

EPILOG = """
[bold]Examples[/bold]

  abliterate edit demo --direction demo.safetensors -o demo-abliterated

  abliterate edit ./my-model --direction mine.npy -o weaker --strength 0.6 --embeddings keep

  abliterate edit model-Q4_K_M.gguf --direction mine.npy -o edited.gguf

  abliterate edit ./my-model --direction mine.npy -o edited.gguf --format gguf --type q4_k_m
"""


def edit(
    model: options.Model,
    direction: Annotated[
        Path,
        typer.Option(
            "--direction",
            "-d",
            metavar="FILE",
            help="What select or compare wrote, the result of a run, a .npy of shape d or k × d, or a control vector "
            "in a .gguf.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to create, or GGUF.", metavar="OUT")],
    layer: Annotated[
        Optional[int],
        typer.Option(
            help="Of directions by layer take that of this one (from 0) out of all.", show_default="each layer's own"
        ),
    ] = None,
    strength: options.Strength = 1.0,
    embeddings: options.Embeddings = "edit",
    keep_norms: options.KeepNorms = False,
    output_format: options.Format = "checkpoint",
    stored_type: options.Type = None,
    no_undo: options.NoUndo = False,
    requantize: options.Requantize = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an edit that was interrupted.")] = False,
    as_json: options.Json = False,
) -> None:
    """Steps 3 and 4: project the direction out of every weight of MODEL that writes to the residual stream; save OUT.

    Needs no memory for the model: weights are rewritten a few rows at a time. OUT appears when it is complete.

    MODEL may be a GGUF file here; of a split one, its first part. OUT.gguf then has its records in OUT.abliteration.
    """
    from abliterate.at_rest import edit as edit_verb
    from abliterate.report.table import print_run

    with console.progress_bars("interrupted; --resume goes on with it") as steps:
        record = edit_verb(
            model, direction, output, resume=resume, steps=steps, layer=layer, strength=strength, embeddings=embeddings,
            keep_norms=keep_norms, format=output_format, type=stored_type, undo=not no_undo,
            requantize=requantize,
        )  # fmt: skip
    if as_json:
        console.print_json(record.as_dict)
    else:
        print_run(console.stdout(), record, str(output))
