"""`abliterate inspect`: what an edit would do, before it does."""

from __future__ import annotations

from dataclasses import asdict

from abliterate.cli import console, options
from abliterate.envelope import enveloped

EPILOG = """
[bold]Examples[/bold]

  abliterate inspect demo

  abliterate inspect ./my-model --embeddings untie --json

  abliterate inspect ./model-Q4_K_M.gguf
"""


def inspect(
    model: options.Model,
    embeddings: options.Embeddings = "edit",
    no_undo: options.NoUndo = False,
    requantize: options.Requantize = None,
    as_json: options.Json = False,
) -> None:
    """Which weights of MODEL write to the residual stream, what an edit would change and leave, what it would take.

    Reads headers only and runs nothing. An edit that would be refused ends in the same message and exit code here.

    MODEL may be a GGUF file here; of a split one, its first part.
    """
    from abliterate.inspection import inspect as inspect_verb
    from abliterate.report.table import print_inspection

    with console.progress_bars():
        found = inspect_verb(model, embeddings=embeddings, undo=not no_undo, requantize=requantize)
    if as_json:
        console.print_json(enveloped("inspection", asdict(found)))
    else:
        print_inspection(console.stdout(), asdict(found))
