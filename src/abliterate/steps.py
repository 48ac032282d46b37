"""The steps one by one: what `run` does in order, and what each verb of its own does between files.

Owns what is handed from step to step; computes nothing itself, and knows no order.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Literal

from abliterate import observe as observing
from abliterate.activations.collect import collect, collect_sets
from abliterate.activations.stats import ActivationStats
from abliterate.architecture.blockwise import why_not_blockwise
from abliterate.checkpoint import Checkpoint
from abliterate.checkpoint.scan import require_finite
from abliterate.direction.direction import Direction
from abliterate.errors import UnsupportedError, UsageError, VerifyError
from abliterate.evaluate.agreement import agreed
from abliterate.evaluate.classifier import CLASSIFIER
from abliterate.evaluate.endpoint import connect
from abliterate.evaluate.evaluation import Evaluation, Questions, evaluate_alone, evaluate_first_tokens, evaluate_pair
from abliterate.evaluate.judge import RULES, Judge
from abliterate.evaluate.text import load_text
from abliterate.model import native
from abliterate.model.chat import ChatFormat, load_tokenizer
from abliterate.model.load import ChatModel, load_model, pick_device, pick_dtype
from abliterate.model.memory import available, fits_whole, need, require_as_stored
from abliterate.model.native import AnyModel, NativeModel
from abliterate.model.progress import Steps, no_steps
from abliterate.model.run import first_token_log_probs, kl_divergence
from abliterate.observe import Observation
from abliterate.options import Options, parse_bytes
from abliterate.prompts import PromptSet, Splits
from abliterate.roles import Sets, prompt_splits

logger = logging.getLogger("abliterate")
#: Prompts on which both engines must agree about a GGUF, and the KL, in nats, that is no rounding.
_SHOWN, _FAR = 4, 0.5


def asked_of(options: Options) -> dict[str, str]:
    """What the answer to "the same prompts, asked alike?" hangs on beside the options' names: hashes of contents.

    Raises:
        PromptError: as `prompt_splits` says.
        UsageError: the chat template's file cannot be read.
    """
    whole = prompt_splits(dataclasses.replace(options, prompts=None))
    found = {f"{kind} prompts": s.whole.sha256 for kind, s in zip(("harmful", "harmless"), whole, strict=True)}
    found["dtype"] = str(pick_dtype(options.dtype, pick_device(options.device)))
    if options.chat_template is not None:
        try:
            found["chat template"] = sha256(Path(options.chat_template).read_bytes()).hexdigest()
        except OSError as error:
            raise UsageError(f"--chat-template {options.chat_template}: cannot be read ({error.strerror})") from None
    return found


def load(source: Path, options: Options, memory: int | None = None, adapter: Path | None = None) -> ChatModel:
    """The model, ready to run as the options say, with an adapter merged into it; block by block within `memory`."""
    return load_model(
        source,
        adapter=adapter,
        memory=memory,
        device=options.device,
        dtype=options.dtype,
        system_prompt=options.system_prompt,
        chat_template=Path(options.chat_template) if options.chat_template else None,
        thinking=options.thinking,
    )


def on_llama_cpp(models: list[Checkpoint], options: Options) -> bool:
    """Whether llama.cpp runs these models, as it does where all are GGUF files, unless options say otherwise.

    Raises:
        UsageError: it is asked to run a folder, or for what it does not do.
        ResourceError: they do not fit in memory.
    """
    folders = [model.source for model in models if model.format != "gguf"]
    if options.engine == "transformers" or (options.engine is None and folders):
        return False
    if folders:
        raise UsageError(f"--engine llama.cpp: runs GGUF files, and {folders[0]} is none; leave it out, or convert it")
    for name in ("device", "dtype"):
        if (given := getattr(options, name)) is not None:
            raise UsageError(
                f"--{name} {given}: llama.cpp computes as the file is stored, on what its build knows; leave it out, "
                "or give --engine transformers"
            )
    free = parse_bytes(options.memory) if options.memory is not None else available(pick_device("cpu"))
    require_as_stored(models, free)
    return True


def measured_natively(models: list[Checkpoint], options: Options, made: bool) -> bool:
    """Whether llama.cpp measures what a run has edited: where it is asked to, and GGUF files that were `made` for it.

    Else transformers does, which takes a third of the time, and does not read all that llama.cpp does.

    Raises:
        UsageError, ResourceError: as `on_llama_cpp` says.
    """
    engine: Literal["llama.cpp", "transformers"] = options.engine or ("llama.cpp" if made else "transformers")
    # Device and dtype are those the direction is found with.
    return on_llama_cpp(models, dataclasses.replace(options, device=None, dtype=None, engine=engine))


def check_measurable(made: Checkpoint, options: Options, memory: int | None, prompts: Splits) -> None:
    """Check before hours of work that what is to measure a GGUF that was made here can run it.

    Raises:
        UnsupportedError, VerifyError: transformers does not load it, or takes it for another model.
        ResourceError: it does not fit in memory.
    """
    if not options.evaluate or measured_natively([made, made], options, True):
        return
    try:
        model = load(made.source, options, memory)
    except UnsupportedError:
        raise UnsupportedError(
            f"--engine transformers: does not load a GGUF of architecture '{made.model_type}'; leave it out, and "
            "llama.cpp measures it"
        ) from None
    check_runs(model, made, prompts)


def load_native(source: Path, options: Options) -> NativeModel:
    """The model of a GGUF in llama.cpp, ready to run as the options say."""
    template = Path(options.chat_template) if options.chat_template else None
    return native.load_native(source, options.system_prompt, template, options.thinking)


def bounded_memory(models: list[Checkpoint], options: Options) -> int | None:
    """The bytes within which `models`, all at once, must run block by block; None where they fit whole.

    Raises:
        ResourceError: they fit in neither way.
    """
    device = pick_device(options.device)
    needed = need(models, pick_dtype(options.dtype, device), device, options.generate)
    free = parse_bytes(options.memory) if options.memory is not None else available(device)
    if free is None or needed.whole <= free:
        why_not = None
    elif any(model.format == "gguf" for model in models):
        why_not = "a GGUF does not run block by block, its safetensors checkpoint does"
    elif options.format == "adapter" and options.evaluate:
        why_not = "block by block no adapter can be compared: --no-eval"
    else:
        from transformers import AutoConfig

        why_not = why_not_blockwise(AutoConfig.from_pretrained(models[0].path))
    whole = fits_whole(needed, free, why_not)
    logger.log(
        logging.INFO if whole else logging.WARNING,
        "%s: about %.1f GB of memory (%.1f GB whole, %.1f GB block by block; %s may be used)",
        "whole in memory" if whole else "block by block", (needed.whole if whole else needed.blockwise) / 1e9,
        needed.whole / 1e9, needed.blockwise / 1e9, f"{free / 1e9:.1f} GB" if free is not None else "any amount",
    )  # fmt: skip
    if not whole and options.generate:
        logger.warning("every token of an answer takes a pass over all blocks; --no-generate does without answers")
    return None if whole else free


def check_site(checkpoint: Checkpoint, options: Options) -> None:
    """Check that the layer and position asked for exist, and that the template can be used, before anything runs.

    Raises:
        UsageError: there is no such layer or position.
        UnsupportedError: there is no chat template, or one that cannot be used.
    """
    n_layers = checkpoint.n_layers
    if options.layer is not None and options.layer >= n_layers:
        raise UsageError(f"--layer {options.layer}: layers are 0 to {n_layers - 1}")
    template = Path(options.chat_template) if options.chat_template else None
    chat = ChatFormat(load_tokenizer(checkpoint.source, template), options.system_prompt, options.thinking)
    tail = len(chat.tail())
    if options.position is not None and -options.position > tail:
        raise UsageError(f"--position {options.position}: positions after the request are {-tail} to -1")


def observe(
    model: ChatModel,
    checkpoint: Checkpoint,
    harmful: Splits,
    harmless: Splits,
    options: Options,
    steps: Steps = no_steps,
) -> Observation:
    """What the base declines and answers of the train and validation prompts.

    Raises:
        NoRefusalError: it declines almost nothing.
        VerifyError: its weights are damaged; names the tensor.
    """
    check_runs(model, checkpoint, harmful)
    return observing.observe(model, harmful, harmless, options, steps)


def check_runs(model: ChatModel, checkpoint: Checkpoint, prompts: Splits) -> None:
    """Run one prompt, so that damaged weights show before anything is asked; a GGUF must do what it does in llama.cpp.

    Raises:
        VerifyError: there is NaN or infinity, naming the tensor, or transformers takes the file for another model.
    """
    with _naming_bad_weights(checkpoint):
        collect(model, prompts.train.head(1))
    if checkpoint.format == "gguf":
        _require_as_llama_cpp(model, checkpoint, prompts.train.head(_SHOWN))


def _require_as_llama_cpp(model: ChatModel, checkpoint: Checkpoint, prompts: PromptSet) -> None:
    rows = model.chat.encode(prompts.prompts)
    engine = native.NativeModel(native.started(checkpoint.source), model.chat, [])
    theirs, ours = (first_token_log_probs(m, rows, len(rows)).cpu() for m in (engine, model))
    kl = kl_divergence(theirs, ours).mean().item()
    if not kl < _FAR:
        raise VerifyError(
            f"{checkpoint.source}: transformers takes it for another model than llama.cpp does (KL of the first token "
            f"{kl:.2f} nats; expected less than {_FAR}), so what is found in it would be wrong; find the direction on "
            "its original safetensors checkpoint"
        )


def collect_both(
    model: ChatModel,
    checkpoint: Checkpoint,
    observed: Observation,
    harmful: Splits,
    harmless: Splits,
    options: Options,
    steps: Steps = no_steps,
    n_layers: int | None = None,
    unfinished: Path | None = None,
) -> tuple[ActivationStats, ActivationStats]:
    """Step 1 for both sets, over the prompts that show the contrast, at the first `n_layers` layers or all.

    In the file `unfinished` it leaves what an interrupted pass goes on from.

    Raises:
        VerifyError: NaN or infinity in the activations; names the tensor if it comes from the weights.
    """
    sets = observing.contrast(observed, harmful, harmless)
    step = steps("collecting activations", sum(map(len, sets)))
    with _naming_bad_weights(checkpoint):
        first, second = collect_sets(
            model, sets, options.batch_size, model_fingerprint=checkpoint.fingerprint, n_layers=n_layers,
            unfinished=unfinished, progress=step,
        )  # fmt: skip
    return first, second


@contextmanager
def _naming_bad_weights(checkpoint: Checkpoint) -> Iterator[None]:
    """Where activations are not finite, look for the weights that cause it, and name them instead."""
    try:
        yield
    except VerifyError:
        require_finite(checkpoint)
        raise


def pick_judge(options: Options, steps: Steps = no_steps) -> Judge:
    """Who judges the test prompts' answers: the rules, or the classifier or an endpoint, with its agreement.

    Raises:
        VerifyError: the endpoint does not reply, or agrees too little.
        UsageError: its key cannot be one.
    """
    if options.judge is None or options.judge == "rules":
        return RULES
    if options.judge == "classifier":
        return agreed(CLASSIFIER)
    return agreed(connect(options.judge, options.judge_model, steps=steps))


def compare(
    base: AnyModel | None,
    edited: AnyModel,
    sets: Sets,
    options: Options,
    direction: Direction | None,
    tokens: list[int],
    judge: Judge,
    steps: Steps = no_steps,
) -> Evaluation:
    """The edited model on the test prompts, against its base where there is one; leak where `direction` is known.

    Without generation, by refusal tokens alone.

    Raises:
        UsageError: the text to be read is none.
    """
    text = load_text(options.text)
    asked = Questions(
        sets.harmful.test, sets.harmless.test, sets.borderline, options.max_new_tokens, options.batch_size, judge, text
    )
    if base is None:
        return evaluate_alone(edited, asked, steps)
    if not options.generate:
        return evaluate_first_tokens(base, edited, asked, tokens, steps, direction)
    return evaluate_pair(base, edited, asked, steps, direction)
