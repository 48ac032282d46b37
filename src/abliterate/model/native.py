"""A GGUF that llama.cpp runs, with what an evaluation asks of a model: logits of batches, and greedy answers.

Owns how rows share sequences and the opening that all have. Never knows what the rows ask.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeAlias

import numpy as np
import torch

from abliterate.model.batches import Batch
from abliterate.model.chat import ChatFormat, Thinking, the_template
from abliterate.model.llamacpp import LlamaCpp, Token
from abliterate.model.load import ChatModel
from abliterate.model.native_tokenizer import NativeTokenizer
from abliterate.model.progress import Progress

#: Rows that are answered at once: enough that a matrix is read for many, few enough for their keys and values.
_ROWS = 16


@dataclass(frozen=True)
class NativeModel:
    """A model in llama.cpp, with the format its chats take. Sequence 0 holds the opening that rows share."""

    engine: LlamaCpp
    chat: ChatFormat
    stop_ids: list[int]
    pad_id: int = 0
    runs_on: ClassVar[str] = "llama.cpp"

    @property
    def device(self) -> torch.device:
        """Where its logits are."""
        return torch.device("cpu")

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return self.engine.n_layers

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.engine.d_model

    def passes(self, todo: Iterable[Batch], tokens: int, progress: Progress) -> Iterator[tuple[Batch, torch.Tensor]]:
        """Each batch with the logits `[rows, tokens, n_vocab]` of what follows its last `tokens` tokens."""
        for batch in todo:
            rows = _rows(batch)
            logits = np.zeros((len(rows), tokens, self.engine.n_vocab), np.float32)
            for start in range(0, len(rows), _ROWS):
                self._fill(rows[start : start + _ROWS], logits[start : start + _ROWS])
            progress(len(rows))
            yield batch, torch.from_numpy(logits)

    def _fill(self, rows: list[list[int]], logits: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> None:
        tokens = logits.shape[1]
        begun = self._opened(rows, tokens, 0)
        wanted, places = list[Token](), list[tuple[int, int]]()
        for i, row in enumerate(rows):
            first = max(0, len(row) - tokens)
            wanted += [Token(row[p], p, i + 1, p >= first) for p in range(begun, len(row))]
            places += [(i, p - len(row)) for p in range(first, len(row))]
        for place, found in zip(places, self.engine.read(wanted), strict=True):
            logits[place] = found

    def made(self, rows: list[list[int]], budget: int, progress: Progress) -> list[list[int]]:
        """At most `budget` greedy tokens behind each row, up to the token that ends it; as one ends, another begins."""
        answers: list[list[int]] = [[] for _ in rows]
        stop, waiting = set(self.stop_ids), deque(range(len(rows)))
        begun = self._opened(rows, 1, budget)
        free, going = list(range(1, min(_ROWS, len(rows)) + 1)), dict[int, int]()
        while waiting or going:
            todo = [Token(answers[i][-1], len(rows[i]) + len(answers[i]) - 1, s, True) for s, i in going.items()]
            while free and waiting:
                i, sequence = waiting.popleft(), free.pop()
                self.engine.copy(0, sequence)
                going[sequence] = i
                last = len(rows[i]) - 1
                todo += [Token(rows[i][p], p, sequence, p == last) for p in range(begun, last + 1)]
            order = [token.sequence for token in todo if token.wanted]
            for sequence, logits in zip(order, self.engine.read(todo), strict=True):
                answer = answers[going[sequence]]
                answer.append(int(logits.argmax()))
                if answer[-1] in stop or len(answer) == budget:
                    del going[sequence]
                    free.append(sequence)
                    progress(1)
        return answers

    def _opened(self, rows: list[list[int]], keep: int, more: int) -> int:
        """Make room for rows that get `more` tokens; how many each begins with are in its sequence already.

        At least `keep` tokens of each are left to be read. A row alone is read whole.
        """
        first, longest = rows[0], min(map(len, rows)) - keep
        alike = next((p for p in range(longest) if any(row[p] != first[p] for row in rows)), max(0, longest))
        opening = first[:alike] if len(rows) > 1 else []
        count = min(_ROWS, len(rows))
        self.engine.room(count + 1, max(map(len, rows)) + more)
        self.engine.read([Token(token, p, 0, False) for p, token in enumerate(opening)])
        for sequence in range(1, count + 1):
            self.engine.copy(0, sequence)
        return len(opening)


#: Whatever runs a model.
AnyModel: TypeAlias = ChatModel | NativeModel


def _rows(batch: Batch) -> list[list[int]]:
    """The tokens of each row of a batch, with those of its openings."""
    before = _rows(batch.opening) if batch.opening is not None else []
    own = batch.attention_mask[:, batch.shared :].bool()
    rows = [ids[mask].tolist() for ids, mask in zip(batch.input_ids, own, strict=True)]
    return [before[i] + row for i, row in zip(batch.after, rows, strict=True)] if before else rows


def started(path: Path) -> LlamaCpp:
    """llama.cpp with a GGUF file, on as many threads as torch takes."""
    return LlamaCpp(path, torch.get_num_threads())


def load_native(
    path: Path, system_prompt: str | None = None, chat_template: Path | None = None, thinking: Thinking = "template"
) -> NativeModel:
    """The model in a GGUF file, of a split one the first part, in llama.cpp.

    Raises:
        UnsupportedError: llama.cpp is not installed, or there is no chat template.
        CheckpointError: llama.cpp cannot load the file; says why.
        UsageError: the template file cannot be read.
    """
    engine = started(path)
    tokenizer = NativeTokenizer(engine)
    tokenizer.chat_template = the_template(path, tokenizer.chat_template, chat_template)
    return NativeModel(engine, ChatFormat(tokenizer, system_prompt, thinking), tokenizer.stop_ids)
