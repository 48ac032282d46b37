"""`abliterate bench`: public benchmarks of base and edited model, and what was retained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from abliterate.cli import console, options

EPILOG = """
[bold]Examples[/bold]

  abliterate bench demo-abliterated --base demo -o demo-bench

  abliterate bench ./edited --base org/model -o bench --tasks mmlu,gsm8k,truthfulqa_mc2 --limit 200
"""


def bench(
    model: options.Model,
    base: Annotated[
        str, typer.Option("--base", metavar="BASE", help="What MODEL was made of.", callback=options.there)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Folder to create.")],
    tasks: Annotated[
        str,
        typer.Option(
            metavar="TASK,TASK…",
            help="Tasks and groups of lm-eval; the built-in one, 360 questions over 12 subjects, needs no network.",
        ),
    ] = "abliterate_mcq",
    limit: Annotated[
        Optional[int], typer.Option(help="At most this many questions of each task.", show_default="all")
    ] = None,
    margin: Annotated[
        float, typer.Option(help="The loss, as a share of all questions, that the word retained excludes.")
    ] = 0.02,
    system_prompt: options.SystemPrompt = None,
    chat_template: options.ChatTemplate = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    batch_size: options.BatchSize = options.DEFAULT.batch_size,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was interrupted.")] = False,
    as_json: options.Json = False,
) -> None:
    """lm-eval's benchmarks of BASE and MODEL, as chats, paired question by question; takes abliterate\\[bench].

    "Retained" is said of a task where a loss of --margin or more can be excluded, "lost" or "gained" where a change is
    shown, all tasks together with an error of 5%.
    """
    from abliterate.report.comparison import print_benchmarks
    from abliterate.verbs import bench as bench_verb

    with console.progress_bars("interrupted; --resume goes on with it") as steps:
        found = bench_verb(
            model, base, output, [t.strip() for t in tasks.split(",") if t.strip()], n_questions=limit, margin=margin,
            resume=resume, steps=steps, system_prompt=system_prompt,
            chat_template=None if chat_template is None else str(chat_template), device=device, dtype=dtype,
            batch_size=batch_size,
        )  # fmt: skip
    if as_json:
        console.print_json(found.as_dict)
    else:
        print_benchmarks(console.stdout(), found.as_dict)
