"""What can be set about a run, and which values make sense.

Owns the options as a value; never knows how a command line or a step uses them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from abliterate.errors import UsageError

#: Most prompts used of each set, unless `limit` says otherwise.
LIMITS = {"train": 64, "validation": 48, "test": 64}
#: More directions than this are asked for in vain: each takes its own pass over all candidates.
MOST_DIRECTIONS = 8
#: How a direction is made of two means, and what is left along it.
METHODS = ("projected", "difference", "per-layer", "affine")
#: What OUT can be: what MODEL is, an adapter for it, or either format whatever MODEL is.
FORMATS = ("checkpoint", "adapter", "gguf", "safetensors")
#: What runs a model.
ENGINES = ("llama.cpp", "transformers")
#: The judges that come with the package; any other is an endpoint.
JUDGES = ("rules", "classifier")


@dataclass(frozen=True)
class Options:
    """Everything that can be set about a run, as resolved; the verbs' options of the same names explain each."""

    harmful: str | None = None
    harmless: str | None = None
    borderline: str | None = None
    limit: int | None = None
    prompts: str | None = None
    layer: int | None = None
    position: int | None = None
    directions: int = 1
    method: Literal["projected", "difference", "per-layer", "affine"] = "projected"
    keep: Literal["harmful"] | None = None
    strength: float = 1.0
    max_kl: float = 0.2
    tune: bool | None = None
    target_refusals: float | None = None
    embeddings: Literal["edit", "keep", "untie"] = "edit"
    keep_norms: bool = False
    format: Literal["checkpoint", "adapter", "gguf", "safetensors"] = "checkpoint"
    type: str | None = None
    undo: bool = True
    requantize: str | None = None
    device: str | None = None
    dtype: str | None = None
    memory: str | None = None
    engine: Literal["llama.cpp", "transformers"] | None = None
    batch_size: int = 64
    max_new_tokens: int = 32
    generate: bool = True
    seed: int = 0
    system_prompt: str | None = None
    chat_template: str | None = None
    thinking: Literal["template", "on", "off"] = "template"
    evaluate: bool = True
    judge: str | None = None
    judge_model: str | None = None
    text: str | None = None
    force: bool = False

    @property
    def tested_strength(self) -> float:
        """The strength of the causal test: what is to be strengthened is chosen by what removing it does."""
        return self.strength if self.strength > 0 else 1.0

    def check(self) -> None:
        """Raise `UsageError` for values that make no sense, before anything is loaded."""
        for name, least in (("limit", 8), ("batch_size", 1), ("max_new_tokens", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"--{name.replace('_', '-')} {value}: expected at least {least}")
        if self.prompts is not None:
            parse_part(self.prompts)
        if self.memory is not None:
            parse_bytes(self.memory)
        if self.layer is not None and self.layer < 0:
            raise UsageError(f"--layer {self.layer}: layers count from 0")
        if self.position is not None and self.position >= 0:
            raise UsageError(f"--position {self.position}: positions are negative, -1 is the prompt's last token")
        if not 1 <= self.directions <= MOST_DIRECTIONS:
            raise UsageError(f"--directions {self.directions}: expected 1 to {MOST_DIRECTIONS}")
        if not self.max_kl > 0:
            raise UsageError(f"--max-kl {self.max_kl:g}: expected a positive number of nats")
        if not -4 <= self.strength <= 4 or not self.strength:
            raise UsageError(
                f"--strength {self.strength:g}: expected -4 to 4 and not 0, which changes nothing (1 removes the "
                "direction, 2 reflects, -1 doubles it)"
            )
        self._check_method()
        self._check_keep()
        self._check_tuning()
        self._check_judge()
        for name, given in (("text", self.text), ("borderline", self.borderline)):
            if given is not None and not self.evaluate and not (name == "borderline" and self.keep):
                raise UsageError(f"--{name} {given}: with --no-eval nothing is measured; leave out one")
        if self.thinking not in ("template", "on", "off"):
            raise UsageError(f"--thinking {self.thinking}: expected on, off or template")
        if self.engine not in (None, *ENGINES):
            raise UsageError(f"--engine {self.engine}: expected {' or '.join(ENGINES)}")
        check_embeddings(self.embeddings)
        if self.format not in FORMATS:
            raise UsageError(f"--format {self.format}: expected {', '.join(FORMATS)}")
        if self.type is not None and self.format not in ("gguf", "safetensors"):
            raise UsageError(f"--type {self.type}: is a GGUF's or a folder's; add --format gguf or safetensors")
        if self.format == "gguf" and self.embeddings == "untie":
            raise UsageError("--embeddings untie: a GGUF is given no LM head of its own; use --embeddings edit or keep")
        if self.format == "adapter" and self.keep_norms:
            raise UsageError("--format adapter: an edit that keeps norms is of full rank and fits none; leave out one")

    @property
    def why_not_tuned(self) -> str | None:
        """Why strengths are not tuned, by the options alone; None where nothing speaks against it."""
        if self.tune is False:
            return "--no-tune"
        if self.strength != 1:
            return f"--strength {self.strength:g}"
        if self.keep_norms:
            return "--keep-norms"
        if self.method in ("per-layer", "affine"):
            return f"--method {self.method}"
        return None if self.generate else "--no-generate"

    @property
    def test_max_kl(self) -> float:
        """The bound of the causal test: a tuned edit costs less than one at full strength, and has `max_kl` itself."""
        return self.max_kl if self.why_not_tuned else max(self.max_kl, type(self).max_kl)

    def _check_method(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"--method {self.method}: expected {', '.join(METHODS)}")
        if self.method != "projected" and self.keep is not None:
            raise UsageError(f"--method {self.method}: leave it out with --keep {self.keep}")
        if self.method in ("per-layer", "affine") and self.directions > 1:
            raise UsageError(f"--method {self.method}: takes one direction, not --directions {self.directions}")
        if self.method == "affine" and self.keep_norms:
            raise UsageError("--method affine: what it adds changes norms; leave out --keep-norms")
        if self.method == "affine" and self.embeddings == "keep":
            raise UsageError("--method affine: what it adds goes into the embedding; leave out --embeddings keep")

    def _check_keep(self) -> None:
        if self.keep not in (None, "harmful"):
            raise UsageError(f"--keep {self.keep}: expected harmful")
        if self.keep is not None and (self.directions > 1 or self.strength < 0):
            other = f"--directions {self.directions}" if self.directions > 1 else f"--strength {self.strength:g}"
            raise UsageError(f"--keep harmful: goes with one direction that is taken out, not with {other}")
        if self.keep is not None and (why_not := self.why_not_tuned) is not None:
            raise UsageError(f"--keep harmful: true refusals are kept by tuning, and with {why_not} there is none")

    def _check_tuning(self) -> None:
        if self.target_refusals is not None and not 0 <= self.target_refusals < 1:
            raise UsageError(f"--target-refusals {self.target_refusals:g}: expected a share, such as 0.05")
        why_not = self.why_not_tuned
        asked = "--tune" if self.tune else "--target-refusals" if self.target_refusals is not None else None
        if why_not is not None and asked is not None:
            raise UsageError(f"{asked}: with {why_not} no strengths are tuned; leave out one")

    def _check_judge(self) -> None:
        if self.judge_model is not None and self.judge in (None, *JUDGES):
            raise UsageError(f"--judge-model {self.judge_model}: there is no endpoint to ask; name one with --judge")
        if self.judge is None:
            return
        if self.judge not in JUDGES:
            check_endpoint(self.judge)
        if not (self.evaluate and self.generate):
            without = "--no-generate" if self.evaluate else "--no-eval"
            raise UsageError(f"--judge {self.judge}: with {without} there are no answers to judge; leave out one")


def check_endpoint(url: str) -> None:
    """Raise `UsageError` for what is no address of an endpoint, or holds more than an address (a key, a query)."""
    if "@" in url or "?" in url:  # not quoted: what stands there may be a key, and addresses are kept in records
        raise UsageError("--judge: expected an address without user or query; a key goes into ABLITERATE_JUDGE_KEY")
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good or not url.isascii() or not url.isprintable() or set(url) & set(" #"):
        raise UsageError(f"--judge {url}: expected {', '.join(JUDGES)}, or an address such as http://localhost:8000/v1")


def parse_part(text: str) -> tuple[int, int]:
    """`(0, 4)` from `0/4`: the first of four parts.

    Raises:
        UsageError: it is not such a part.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or not int(found[1]) < int(found[2]):
        raise UsageError(f"--prompts {text}: expected a part such as 0/4, the first of four")
    return int(found[1]), int(found[2])


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(text: str) -> int:
    """Bytes from `4GiB`, `4G`, `3.5 GB` or a plain number.

    Raises:
        UsageError: it is none of these, or nothing.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]?i?)b?\s*", text.lower())
    if found is None or found[2] not in _UNITS or not 0 < float(found[1]) < 1e18:
        raise UsageError(f"--memory {text[:40]}: expected a size such as 4GiB or 3.5GB")
    return int(float(found[1]) * _UNITS[found[2]])


def check_embeddings(value: str) -> None:
    """Raise `UsageError` for what is not a way to treat embeddings."""
    if value not in ("edit", "keep", "untie"):
        raise UsageError(f"--embeddings {value}: expected edit, keep or untie")
