"""`abliterate run`: everything, in one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from abliterate.cli import console, options

EPILOG = """
[bold]Examples[/bold]

  abliterate run demo -o demo-abliterated

  abliterate run Qwen/Qwen2.5-0.5B-Instruct -o qwen-abliterated --device cuda

  abliterate run ./my-model -o out --harmful refused.txt --harmless answered.txt --json

  abliterate run ./my-model -o declines-more --strength -0.5

  abliterate run ./model-Q4_K_M.gguf -o edited.gguf

  abliterate run ./my-model -o edited.gguf --format gguf --type q4_k_m
"""


def run(
    model: Annotated[
        Optional[str],
        typer.Argument(
            metavar="MODEL",
            help="A Hugging Face folder, a GGUF file, a hub id org/name or org/name@revision, or demo.",
            callback=options.there,
        ),
    ] = None,
    output: Annotated[
        Optional[Path], typer.Option("--output", "-o", help="Folder to create, or GGUF.", metavar="OUT")
    ] = None,
    model_option: Annotated[Optional[str], typer.Option("--model", hidden=True, callback=options.there)] = None,
    harmful: options.Harmful = None,
    harmless: options.Harmless = None,
    borderline: options.Borderline = None,
    limit: options.Limit = None,
    seed: options.Seed = 0,
    system_prompt: options.SystemPrompt = None,
    chat_template: options.ChatTemplate = None,
    thinking: options.Thinking = "template",
    layer: options.Layer = None,
    position: options.Position = None,
    method: options.Method = "projected",
    directions: options.Directions = 1,
    strength: options.Strength = 1.0,
    max_kl: options.MaxKl = options.DEFAULT.max_kl,
    keep: options.Keep = None,
    tune: options.Tune = None,
    target_refusals: options.TargetRefusals = None,
    embeddings: options.Embeddings = "edit",
    keep_norms: options.KeepNorms = False,
    output_format: options.Format = "checkpoint",
    stored_type: options.Type = None,
    no_undo: options.NoUndo = False,
    requantize: options.Requantize = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    memory: options.Memory = None,
    engine: options.Measured = None,
    no_generate: options.NoGenerate = False,
    batch_size: options.BatchSize = options.DEFAULT.batch_size,
    max_new_tokens: options.MaxNewTokens = options.DEFAULT.max_new_tokens,
    judge: options.Judge = None,
    judge_model: options.JudgeModel = None,
    text: options.Text = None,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="Skip the comparison before and after.")] = False,
    force: options.Force = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    as_json: options.Json = False,
) -> None:
    """Find the refusal direction of MODEL, project it out, save OUT, and measure what changed.

    OUT is a complete checkpoint in the format MODEL came in, unless --format names another; the record is
    OUT/abliteration/run.json (of out.gguf it is out.abliteration/run.json).
    It appears only when everything is done: an interrupted run leaves OUT.partial, and --resume goes on.
    """
    if (model is None) == (model_option is None):
        raise typer.BadParameter("give one MODEL (or --model MODEL)")
    if output is None:
        raise typer.BadParameter("give the folder (or GGUF) to create with -o OUT (or --output OUT)")
    from abliterate.pipeline import run as run_pipeline
    from abliterate.report.figures import warnings
    from abliterate.report.table import print_run

    hint = f"interrupted; the same command with --resume goes on from the last finished step (kept in {output}.partial)"
    with console.progress_bars(hint) as steps:
        record = run_pipeline(
            model or model_option or "", output, resume=resume, steps=steps,
            harmful=harmful, harmless=harmless, borderline=borderline, limit=limit, seed=seed,
            system_prompt=system_prompt,
            chat_template=str(chat_template) if chat_template else None, thinking=thinking,
            layer=layer, position=position, method=method, directions=directions,
            strength=strength, max_kl=max_kl, keep=keep, tune=tune, target_refusals=target_refusals,
            embeddings=embeddings, keep_norms=keep_norms, format=output_format, type=stored_type, undo=not no_undo,
            requantize=requantize, device=device, dtype=dtype, memory=memory, engine=engine, generate=not no_generate,
            batch_size=batch_size, max_new_tokens=max_new_tokens, judge=judge, judge_model=judge_model,
            text=str(text) if text else None,
            evaluate=not no_eval, force=force,
        )  # fmt: skip
    if as_json:
        for warning in warnings(record):
            console.tell(warning)
        console.print_json(record.as_dict)
    else:
        print_run(console.stdout(), record, str(output))
