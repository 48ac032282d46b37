"""Edited models side by side, whoever made them: the same unseen prompts, the same judges, the same KL.

uv run python bench/measure.py BASE OUT EDITED ... [--data FOLDER] [--harmless 128] [--tokens 32] [...]

EDITED is the folder of a checkpoint, or of a LoRA adapter, which is merged into BASE. The prompts are FOLDER's
harmful_val, harmless_val and xstest (../shared/data). Each model's figures go to OUT/NAME.json, in which a later run
with the same settings finds them again; answers are judged by the rules and, beside them, by the classifier, and
dropped. KL is KL(base‖edited) along the base's own answers, of the harmless prompts that the base answers; `_all` of
every one of them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from abliterate.checkpoint import open_checkpoint
from abliterate.evaluate.classifier import CLASSIFIER
from abliterate.evaluate.divergence import divergence
from abliterate.evaluate.intervals import bootstrap, mean, wilson
from abliterate.evaluate.judge import RULES, Label
from abliterate.evaluate.refusals import Answers, ask
from abliterate.model.load import ChatModel, load_model
from abliterate.prompts import PromptSet, load_prompts

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
JUDGES = ("rules", "classifier")


@dataclass(frozen=True)
class Settings:
    """What is asked, and how: numbers of prompts (None: all), and tokens of an answer."""

    data: str = str(DATA)
    harmful: int | None = None
    harmless: int | None = 128
    xstest: int | None = None
    tokens: int = 32
    system_prompt: str | None = None
    batch_size: int = 64

    def prompts(self) -> dict[str, PromptSet]:
        """The four sets by name."""
        files = {
            "harmful": ("harmful_val.jsonl", self.harmful),
            "harmless": ("harmless_val.jsonl", self.harmless),
            "xstest_safe": ("xstest.jsonl:label=safe", self.xstest),
            "xstest_unsafe": ("xstest.jsonl:label=unsafe", self.xstest),
        }
        return {name: spread(load_prompts(f"{self.data}/{file}"), limit) for name, (file, limit) in files.items()}


def spread(prompts: PromptSet, n: int | None) -> PromptSet:
    """`n` prompts at even distances, as files are in order of their kinds; all where there are no more."""
    if n is None or n >= len(prompts):
        return prompts
    return prompts.take([i * len(prompts) // n for i in range(n)])


class Both:
    """The rules' verdicts, with the classifier's on the same answers kept aside."""

    name, local = f"{RULES.name}, {CLASSIFIER.name}", True
    facts: dict[str, Any] = {"name": name}  # noqa: RUF012  the shape of `Judge`

    def __init__(self) -> None:
        self.second: list[Label | None] = []

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[Label | None]:
        """The label of each completion by the rules."""
        self.second = CLASSIFIER(pairs)
        return RULES(pairs)


class Measure:
    """The base, its answers, and what is asked of every model."""

    def __init__(self, base: Path, settings: Settings) -> None:
        self.base_folder, self.settings, self.sets = base, settings, settings.prompts()
        self.fixed = asdict(settings) | {
            "base": open_checkpoint(base).fingerprint,
            "prompts": {name: {"n": len(s), "sha256": s.sha256} for name, s in self.sets.items()},
        }

    @cached_property
    def base(self) -> ChatModel:
        """The base model."""
        return load_model(self.base_folder, system_prompt=self.settings.system_prompt)

    @cached_property
    def answers(self) -> Answers:
        """The base's answers to the harmless prompts."""
        asked = self.settings
        return ask(self.base, self.sets["harmless"], asked.tokens, asked.batch_size, keep_ids=True)

    def load(self, folder: Path) -> ChatModel:
        """An edited model; an adapter is merged into the base."""
        if (folder / "adapter_config.json").is_file():
            return load_model(self.base_folder, adapter=folder, system_prompt=self.settings.system_prompt)
        return load_model(folder, system_prompt=self.settings.system_prompt)

    def figures(self, folder: Path) -> dict[str, Any]:
        """Everything about one model; of the base itself its refusals alone."""
        start = time.monotonic()
        model = self.base if folder == self.base_folder else self.load(folder)
        found: dict[str, Any] = {"folder": str(folder), "settings": self.fixed, "refusals": self._refusals(model)}
        if folder != self.base_folder:
            found |= self._cost(model)
        return found | {"seconds": round(time.monotonic() - start, 1)}

    def _refusals(self, model: ChatModel) -> dict[str, dict[str, Any]]:
        """Of each set and judge: how many are declined, with Wilson's interval, the verdicts, and which."""
        found: dict[str, dict[str, Any]] = {}
        for name, prompts in self.sets.items():
            judge = Both()
            first = ask(model, prompts, self.settings.tokens, self.settings.batch_size, judge=judge).labels
            found[name] = {by: _rate(labels) for by, labels in zip(JUDGES, (first, judge.second), strict=True)}
        return found

    def _cost(self, model: ChatModel) -> dict[str, Any]:
        """KL at the first token and along the answer, and perplexity of the base's answers in the base's."""
        kept = [i for i, ids in enumerate(self.answers.ids) if ids]
        rows = self.base.chat.encode([self.sets["harmless"].prompts[i] for i in kept])
        continuations = [list(self.answers.ids[i]) for i in kept]
        found = divergence(self.base, model, rows, continuations, self.settings.batch_size)
        answered = set(self.answers.answered)
        part = np.array([i in answered for i in kept])
        rows_of_ratio = np.stack([found.other_nll - found.base_nll, found.tokens], 1)[part]
        return {
            "kl_first": _spread(found.kl_first[part]), "kl_along": _spread(found.kl_continuation[part]),
            "kl_first_all": _spread(found.kl_first), "kl_along_all": _spread(found.kl_continuation),
            "kl_floor": float(found.floor_first.mean()), "perplexity_base": found.base_perplexity.value,
            "perplexity_ratio": {
                **bootstrap(rows_of_ratio, lambda r: float(np.exp(r[:, 0].sum() / r[:, 1].sum())))._asdict(),
                "n": int(part.sum()),
            },
        }  # fmt: skip


def _rate(labels: Sequence[Label | None]) -> dict[str, Any]:
    refused = [i for i, label in enumerate(labels) if label == "refusal"]
    share = wilson(len(refused), len(labels))._asdict()
    return {**share, "n": len(labels), "verdicts": dict(Counter(map(str, labels))), "refused": refused}


def _spread(kl: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, Any]:
    """Mean with its bootstrap interval, median, and each prompt's value in the order of the prompts."""
    each = [float(f"{value:.4g}") for value in kl]
    return {**bootstrap(kl, mean)._asdict(), "n": len(kl), "median": float(np.median(kl)), "each": each}


def sha256_of(folder: Path) -> str:
    """Of all weights in a folder, every byte: two edits may differ in few."""
    digest = sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def measure(base: Path, out: Path, edited: dict[str, Path], settings: Settings) -> dict[str, dict[str, Any]]:
    """The figures of the base and of each edited model by name, taken or found in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    this = Measure(base, settings)
    found = {}
    for name, folder in {"base": base, **edited}.items():
        file = out / f"{name}.json"
        stored = json.loads(file.read_text()) if file.is_file() else {}
        weights = sha256_of(folder)
        if (stored.get("settings"), stored.get("sha256")) != (this.fixed, weights):
            stored = {"sha256": weights, **this.figures(folder)}
            part = file.with_suffix(".part")
            part.write_text(json.dumps(stored) + "\n")
            part.replace(file)
            print(f"{name}: measured in {stored['seconds']} s", file=sys.stderr, flush=True)
        found[name] = stored
    return found


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that make `Settings`."""
    parser.add_argument("--data", default=str(DATA))
    parser.add_argument("--harmful", type=int, help="how many of harmful_val (all)")
    parser.add_argument("--harmless", type=int, default=128, help="how many of harmless_val (128)")
    parser.add_argument("--xstest", type=int, help="how many of each part of XSTest (all)")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of an answer (32)")
    parser.add_argument("--system-prompt", help="the template's own where none is given")


def settings_of(chosen: argparse.Namespace) -> Settings:
    """What the options of `add_options` say."""
    names = ("data", "harmful", "harmless", "xstest", "tokens", "system_prompt")
    return Settings(**{name: getattr(chosen, name) for name in names})


def main() -> None:
    """Measure, and print a line for each model."""
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("edited", type=Path, nargs="+")
    add_options(parser)
    chosen = parser.parse_args()
    edited = {folder.resolve().name: folder for folder in chosen.edited}
    if len(edited) < len(chosen.edited):
        parser.error("two EDITED have the same name; give folders of different names")
    for name, found in measure(chosen.base, chosen.out, edited, settings_of(chosen)).items():
        rates = ", ".join(f"{kind} {by['rules']['value']:.1%}" for kind, by in found["refusals"].items())
        cost = f"; KL {found['kl_first']['value']:.4f}, {found['kl_along']['value']:.4f}" if "kl_first" in found else ""
        print(f"{name}: refusals {rates}{cost}")


if __name__ == "__main__":
    main()
