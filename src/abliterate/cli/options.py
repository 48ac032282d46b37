"""Options that several verbs share, each declared once. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from abliterate.options import LIMITS
from abliterate.options import Options as _Options

#: What every option is where none is given.
DEFAULT = _Options()


def there(model: Optional[str]) -> Optional[str]:
    """A path at which no model is, told before torch is imported, which takes seconds.

    Raises:
        AbliterateError: as its kinds say.
    """
    from abliterate.checkpoint import hub_name, open_checkpoint, resolve_model

    if model is not None and model != "demo" and hub_name(model) is None:
        open_checkpoint(resolve_model(model))
    return model


_PROMPTS, _MODEL, _JUDGE, _OUTPUT = "Prompts", "Model", "Judge", "Output"

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A Hugging Face folder, a GGUF file, a hub id org/name or org/name@revision, or demo.",
        callback=there,
    ),
]
Harmful = Annotated[
    Optional[str],
    typer.Option(
        help="Requests the model should decline: a txt, json, jsonl, csv or parquet file, a hub data set org/name or a "
        "file in it org/name/FILE; with :COLUMN=VALUE behind it, only the rows whose COLUMN is VALUE.",
        show_default="built-in",
        rich_help_panel=_PROMPTS,
    ),
]
Harmless = Annotated[
    Optional[str],
    typer.Option(
        help="Requests it should answer, such as xstest.csv:label=safe.",
        show_default="built-in",
        rich_help_panel=_PROMPTS,
    ),
]
Borderline = Annotated[
    Optional[str],
    typer.Option(
        help="Requests that sound harmful and are not, to count false refusals on: XSTest or OR-Bench, say. All are "
        "asked, unless --limit says otherwise; nothing is fitted on them, but with --keep harmful, which splits them.",
        show_default="built-in",
        rich_help_panel=_PROMPTS,
    ),
]
Limit = Annotated[
    Optional[int],
    typer.Option(
        help="At most this many prompts in each of train, validation and test.",
        show_default=", ".join(map(str, LIMITS.values())),
        rich_help_panel=_PROMPTS,
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of the split of your own prompt sets.", rich_help_panel=_PROMPTS)]
SystemPrompt = Annotated[
    Optional[str],
    typer.Option(help="System prompt of every chat.", show_default="the template's own", rich_help_panel=_PROMPTS),
]
ChatTemplate = Annotated[
    Optional[Path],
    typer.Option(help="A jinja file to use as chat template.", show_default="the model's", rich_help_panel=_PROMPTS),
]
Thinking = Annotated[
    str,
    typer.Option(
        metavar="on|off|template",
        help="The template's own switch for reasoning before the answer; refusals are told by how the text opens, so "
        "off suits models that reason.",
        rich_help_panel=_PROMPTS,
    ),
]
Device = Annotated[
    Optional[str],
    typer.Option(help="Where to run: cpu, cuda, cuda:1, mps.", show_default="best here", rich_help_panel=_MODEL),
]
Dtype = Annotated[
    Optional[str],
    typer.Option(
        help="What to run in: float32, bfloat16 or float16. Weights are always edited in float32.",
        show_default="best here",
        rich_help_panel=_MODEL,
    ),
]
Memory = Annotated[
    Optional[str],
    typer.Option(
        metavar="SIZE",
        help="Most memory to use, such as 4GiB: a model that does not fit whole is read from its files block by block.",
        show_default="what is free",
        rich_help_panel=_MODEL,
    ),
]
Engine = Annotated[
    Optional[str],
    typer.Option(
        metavar="llama.cpp|transformers",
        help="What runs the models. llama.cpp runs GGUF files as they are, in little memory; transformers with their "
        "weights decoded, which also shows the stream (leak).",
        show_default="llama.cpp for GGUF files",
        rich_help_panel=_MODEL,
    ),
]
Measured = Annotated[
    Optional[str],
    typer.Option(
        "--engine",
        metavar="llama.cpp|transformers",
        help="What measures a GGUF before and after; llama.cpp takes about three times as long.",
        show_default="transformers; llama.cpp where --format gguf converts",
        rich_help_panel=_MODEL,
    ),
]
NoGenerate = Annotated[
    bool,
    typer.Option(
        "--no-generate",
        help="Write no answers: refusals are told by their first token alone. For models that run block by block.",
        rich_help_panel=_MODEL,
    ),
]
BatchSize = Annotated[int, typer.Option(help="Prompts in one forward pass, at most.", rich_help_panel=_MODEL)]
MaxNewTokens = Annotated[int, typer.Option(help="Tokens of each answer that is judged.", rich_help_panel=_MODEL)]
Judge = Annotated[
    Optional[str],
    typer.Option(
        metavar="rules|classifier|URL",
        help="Who judges the answers to the test prompts: the built-in rules, the built-in classifier, or an "
        "OpenAI-compatible endpoint (vLLM, llama.cpp, Ollama). To an endpoint these answers are sent, harmful ones "
        "included; its key goes into ABLITERATE_JUDGE_KEY.",
        show_default="rules",
        rich_help_panel=_JUDGE,
    ),
]
JudgeModel = Annotated[
    Optional[str],
    typer.Option(
        metavar="NAME",
        help="The model to ask there.",
        show_default="the first it lists",
        rich_help_panel=_JUDGE,
    ),
]
Text = Annotated[
    Optional[Path],
    typer.Option(
        metavar="FILE",
        help="A plain UTF-8 text of your own whose perplexity is measured, without a chat template.",
        show_default="built-in, two pages",
        rich_help_panel=_PROMPTS,
    ),
]
Strength = Annotated[
    float,
    typer.Option(
        help="Share of the direction to remove: 1 removes, 2 reflects. Below 0 it is strengthened, so that refusals "
        "rise, false ones too: try -0.5."
    ),
]
Embeddings = Annotated[
    str,
    typer.Option(
        metavar="edit|keep|untie",
        help="edit: the token embedding loses the direction too; tied to the LM head, in both roles. keep: what it "
        "writes along the direction stays. untie: a tied head gets a copy of its own, unedited (a larger checkpoint).",
    ),
]
KeepNorms = Annotated[
    bool,
    typer.Option("--keep-norms", help="Scale what each input writes back to its norm; leaves none of the direction."),
]
Format = Annotated[
    str,
    typer.Option(
        "--format",
        metavar="FORMAT",
        help="What OUT is. checkpoint: what MODEL is. adapter: the same edit as a LoRA adapter for PEFT, a few "
        "megabytes. gguf: OUT.gguf for llama.cpp; safetensors: a folder; where MODEL is the other, it is converted "
        "first and then edited.",
    ),
]
Type = Annotated[
    Optional[str],
    typer.Option(
        "--type",
        metavar="TYPE",
        help="What to convert to: with --format gguf one of llama.cpp's mixes such as q4_k_m, q8_0 or f16; with "
        "--format safetensors bf16, f16 or f32.",
        show_default="bf16",
    ),
]
NoUndo = Annotated[
    bool,
    typer.Option("--no-undo", help="Leave out the 1 to 3% of disk from which undo restores the base."),
]
Requantize = Annotated[
    Optional[str],
    typer.Option(
        metavar="TYPE",
        help="Write the tensors of a GGUF whose type cannot be edited (IQ1 to IQ3, ternary) in this one, such as Q4_K.",
        show_default="such a GGUF is refused",
    ),
]
Layer = Annotated[
    Optional[int], typer.Option(help="Take the direction from this layer (from 0).", show_default="by causal test")
]
Position = Annotated[
    Optional[int],
    typer.Option(help="Take it at this token (-1: the prompt's last).", show_default="by causal test"),
]
Method = Annotated[
    str,
    typer.Option(
        metavar="HOW",
        help="projected: the difference of means without its part along the harmless mean, one for all layers. "
        "difference: as it is. per-layer: each layer loses its own. affine: the difference is moved to the harmless "
        "mean instead of to zero. The last two at strength 1 everywhere, as with --no-tune.",
    ),
]
Directions = Annotated[
    int,
    typer.Option(
        metavar="K",
        help="Take out up to K directions (at most 8): each is found with those before it ablated, and kept while it "
        "stops more refusals of validation prompts for certain.",
    ),
]
MaxKl = Annotated[
    float, typer.Option(help="Most KL(base‖edited) at the first token of harmless prompts that an edit may cost, nats.")
]
Keep = Annotated[
    Optional[str],
    typer.Option(
        metavar="harmful",
        help="Keep true refusals: what goes is the direction of false ones, of borderline requests, without that of "
        "true ones in it.",
        show_default="none",
    ),
]
Tune = Annotated[
    Optional[bool],
    typer.Option(
        "--tune/--no-tune",
        help="Find strengths for every place that writes, and turn the direction, by gradient; without it strength 1 "
        "everywhere.",
        show_default="tune, where the model runs whole",
    ),
]
TargetRefusals = Annotated[
    Optional[float],
    typer.Option(
        metavar="SHARE",
        help="Of the tuned edits take the cheapest that leaves at most this share of refusals, such as 0.05.",
        show_default="the knee",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Go on although the model refuses almost nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.", rich_help_panel=_OUTPUT)]
