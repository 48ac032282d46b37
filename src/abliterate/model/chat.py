"""Render requests through a model's own chat template into token ids, and find the template's tail.

Owns the template, the system prompt and the rule of one BOS; never knows weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jinja2

from abliterate.errors import UnsupportedError, UsageError
from abliterate.model.gguf import gguf_tokenizer

if TYPE_CHECKING:
    from typing import TypeAlias

    from transformers import PreTrainedTokenizerBase

    from abliterate.model.native_tokenizer import NativeTokenizer

    Tokenizer: TypeAlias = PreTrainedTokenizerBase | NativeTokenizer

Thinking = Literal["template", "on", "off"]
_OTHER: dict[Thinking, Thinking] = {"on": "off", "off": "on"}
#: What templates call the switch: Qwen 3, SmolLM 3 and GLM the first, DeepSeek and Granite the second.
_SWITCHES = ("enable_thinking", "thinking")

#: Requests without a common ending: what their renderings end with in common is the template's own.
_PROBES = ("One", "is it two?", "number 3.", "(four)")


@dataclass(frozen=True)
class ChatFormat:
    """How a request becomes token ids: one user turn, an optional system turn, the opening of the answer.

    `thinking` "on" or "off" sets the template's own switch, "template" leaves it.
    """

    tokenizer: Tokenizer
    system_prompt: str | None = None
    thinking: Thinking = "template"

    def render(self, prompt: str) -> str:
        """The text of a chat in which the model is about to answer `prompt`.

        Raises:
            UnsupportedError: the template has no place for a system prompt, or cannot be rendered.
        """
        messages = [{"role": "user", "content": prompt}]
        if self.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        try:
            text = self._rendered(messages, self.thinking)
            if self.thinking != "template" and text == self._rendered(messages, _OTHER[self.thinking]):
                raise UnsupportedError(
                    f"--thinking {self.thinking}: the chat template of {self.name} has no such switch; drop it"
                )
        except jinja2.TemplateError as error:
            hint = "; it may know no system role: drop --system-prompt" if self.system_prompt is not None else ""
            raise UnsupportedError(
                f"{self.name}: the chat template cannot be rendered ({error}){hint}; --chat-template FILE gives another"
            ) from None
        if self.system_prompt is not None and self.system_prompt.strip() not in text:
            raise UnsupportedError(f"{self.name}: the chat template ignores the system prompt; drop --system-prompt")
        return text

    def _rendered(self, messages: list[dict[str, str]], thinking: Thinking) -> str:
        switches: dict[str, Any] = {} if thinking == "template" else dict.fromkeys(_SWITCHES, thinking == "on")
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **switches)
        assert isinstance(text, str)
        return text

    @property
    def name(self) -> str:
        """Where the tokenizer came from."""
        return str(self.tokenizer.name_or_path)

    def encode(self, prompts: tuple[str, ...] | list[str]) -> list[list[int]]:
        """Token ids of each rendered prompt. The template writes BOS where the model wants one; none is added."""
        texts = [self.render(prompt) for prompt in prompts]
        rows: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return rows

    def text(self, ids: list[int]) -> str:
        """The text of an answer, without special tokens."""
        found = self.tokenizer.decode(ids, skip_special_tokens=True)
        assert isinstance(found, str)
        return found

    def tail(self) -> list[int]:
        """The tokens after the instruction: the longest ending that all renderings share, at least one.

        Raises:
            UnsupportedError: all requests render alike.
        """
        rows = self.encode(_PROBES)
        if all(row == rows[0] for row in rows):
            raise UnsupportedError(
                f"{self.name}: the chat template leaves out the request; --chat-template FILE gives another"
            )
        length = 0
        while length < min(map(len, rows)) and len({row[-1 - length] for row in rows}) == 1:
            length += 1
        return rows[0][len(rows[0]) - max(1, length) :]


def load_tokenizer(source: Path, chat_template: Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder or a GGUF file, with its own chat template or the one in a file.

    Raises:
        UnsupportedError: no tokenizer, or no chat template.
        UsageError: the template file cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = (
            gguf_tokenizer(source) if source.is_file() else AutoTokenizer.from_pretrained(source)
        )
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedError(f"{source}: no tokenizer that transformers can load ({_first_line(error)})") from None
    tokenizer.chat_template = the_template(source, tokenizer.chat_template, chat_template)
    return tokenizer


def the_template(source: Path, own: Any, given: Path | None) -> Any:
    """The chat template in the file `given`, or a checkpoint's `own`.

    Raises:
        UnsupportedError: there is none.
        UsageError: the file cannot be read.
    """
    if given is not None:
        try:
            own = given.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{given}: cannot be read as a chat template ({_first_line(error)})") from None
        if not own.strip():
            raise UsageError(f"{given}: empty; expected a jinja chat template")
    if not own:
        raise UnsupportedError(
            f"{source}: the tokenizer has no chat template, so this may be a base model; "
            "if it is a chat model, supply its template with --chat-template FILE"
        )
    return own


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
