"""`abliterate eval`: the measurement alone."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Optional

import typer

from abliterate.cli import console, options
from abliterate.envelope import enveloped

EPILOG = """
[bold]Examples[/bold]

  abliterate eval demo

  abliterate eval demo-abliterated --base demo --json

  abliterate eval edited-Q4_K_M.gguf --base model-Q4_K_M.gguf
"""


def evaluate(
    model: options.Model,
    base: Annotated[
        Optional[str],
        typer.Option(
            metavar="MODEL",
            help="Compare with this model: adds KL, perplexity of its answers, and leak.",
            callback=options.there,
        ),
    ] = None,
    harmful: options.Harmful = None,
    harmless: options.Harmless = None,
    borderline: options.Borderline = None,
    limit: options.Limit = None,
    seed: options.Seed = 0,
    system_prompt: options.SystemPrompt = None,
    chat_template: options.ChatTemplate = None,
    thinking: options.Thinking = "template",
    device: options.Device = None,
    dtype: options.Dtype = None,
    memory: options.Memory = None,
    engine: options.Engine = None,
    no_generate: options.NoGenerate = False,
    batch_size: options.BatchSize = options.DEFAULT.batch_size,
    max_new_tokens: options.MaxNewTokens = options.DEFAULT.max_new_tokens,
    judge: options.Judge = None,
    judge_model: options.JudgeModel = None,
    text: options.Text = None,
    as_json: options.Json = False,
) -> None:
    """Measure MODEL on the test prompts: refusals, whether it recognises harm; with --base what the edit cost.

    Answers are judged, here or by --judge, and dropped; only counts are kept. MODEL may be a GGUF file; of a split one,
    its first part.
    """
    from abliterate.report.table import print_metrics
    from abliterate.verbs import evaluate as evaluate_verb

    with console.progress_bars() as steps:
        found = evaluate_verb(
            model, base, steps=steps, harmful=harmful, harmless=harmless, borderline=borderline, limit=limit, seed=seed,
            system_prompt=system_prompt, chat_template=str(chat_template) if chat_template else None, thinking=thinking,
            device=device, dtype=dtype, memory=memory, engine=engine, generate=not no_generate,
            batch_size=batch_size, max_new_tokens=max_new_tokens, judge=judge, judge_model=judge_model,
            text=str(text) if text else None,
        )  # fmt: skip
    if as_json:
        console.print_json(enveloped("evaluation", {"model": model, "base": base, **asdict(found)}))
    else:
        print_metrics(console.stdout(), [m.as_dict for m in found.metrics], found.verdicts, found.charts, found.engine)
