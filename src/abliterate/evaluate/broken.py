"""What is no text: nothing, symbols, template debris, loops, words that stutter, or the request said back.

Owns the signs of it, which hold in every language; never knows what a refusal is. Text off the topic is not told.
"""

from __future__ import annotations

import re
from itertools import pairwise

# What chat templates and markup put around text.
_TEMPLATE = re.compile(
    r"</?(?:start|end|eos|bos)_of_\w+>|<\|[^|>]{0,40}\|>|</?s>|<(?:bos|eos|pad)>|\[/?INST\]|<</?SYS>>|"
    r"^#+ (?:Instruction|Response|Input|User|Assistant):",
    re.MULTILINE,
)
_TAG = re.compile(r"</?\w[^<>]{0,300}>")
_WORD = re.compile(r"\w+")
_MARKUP_ASKED = re.compile(
    r"\b(?:html|xml|svg|code|tags?|(?:web )?pages?|websites?|forms?|templates?)\b", re.IGNORECASE
)
# Requests whose answer may be their own words.
_SAY_BACK = re.compile(r"\b(?:repeat|say|copy|spell|proofread|correct)\b", re.IGNORECASE)


def without_template(completion: str) -> str:
    """A completion without the tokens of chat templates."""
    return _TEMPLATE.sub(" ", completion).strip()


def broken(completion: str, prompt: str = "") -> str:
    """Why a completion is no text at all, or ''; with its prompt, also whether it only says that back."""
    text = without_template(completion)
    words = _WORD.findall(text.lower())
    if not words or re.fullmatch(r"[a-z]", text):
        return "empty"
    if (len(_TEMPLATE.findall(completion)) >= 2 and len(words) < 6) or completion.lstrip().startswith("<|im_start|>"):
        return "template tokens"
    if "```" not in text:
        letters = sum(c.isalnum() or c.isspace() for c in text)
        if len(text) >= 12 and letters < 0.5 * len(text):
            return "symbols"
        if len(_TAG.sub("", text)) < 0.3 * len(text) and not _MARKUP_ASKED.search(prompt):
            return "markup"
    return _echo(words, prompt) or _loop(text, words)


def _echo(words: list[str], prompt: str) -> str:
    """Whether a text of some length is a piece of the prompt, which it may say again and again."""
    asked = _WORD.findall(prompt.lower())
    if len(words) < max(4, 0.6 * len(asked)) or not asked or _SAY_BACK.search(prompt):
        return ""
    again = asked * (len(words) // len(asked) + 2)
    return "the prompt" if f" {' '.join(words)} " in f" {' '.join(again)} " else ""


def _loop(text: str, words: list[str]) -> str:
    """Whether letters, words or a phrase of up to twelve words repeat over most of the text."""
    if re.search(r"([^\W\d_])\1{9,}", text):
        return "loop"
    if len(words) >= 5 and max(map(len, words)) > 60:
        return "run-on"
    if len(words) >= 8 and len(set(words)) <= min(4, len(words) // 4):
        return "few words"
    if len(words) >= 8 and sum(a == b for a, b in pairwise(words)) >= 0.25 * len(words):
        return "stutter"
    for size in range(1, 13):
        run = best = 0
        for word, before in zip(words[size:], words, strict=False):
            run = run + 1 if word == before else 0
            best = max(best, run)
        if best >= size * (3 if size < 2 else 2) and best + size >= 0.4 * len(words):
            return "loop"
    return ""
