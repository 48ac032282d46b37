"""Perplexity of a plain text that neither model wrote: what an edit costs where nobody asks anything.

Owns the text that comes with the package and how a text is cut into windows; never knows chats or refusals.
"""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from abliterate.errors import UsageError
from abliterate.evaluate.intervals import bootstrap
from abliterate.evaluate.metric import Metric
from abliterate.model.batches import batches
from abliterate.model.native import AnyModel
from abliterate.model.progress import Progress, Steps, silent
from abliterate.model.run import forward, log_probs

if TYPE_CHECKING:
    from abliterate.model.chat import Tokenizer

#: Most tokens of a window: a text gives the more of them, and its interval is the surer, the shorter they are.
WINDOW = 128
#: A shorter text has too few windows for an interval.
LEAST_CHARACTERS = 2000

Rows = list[list[int]]


@dataclass(frozen=True)
class Text:
    """A plain text, and where it came from."""

    name: str
    content: str

    @property
    def source(self) -> str:
        """Its name with the beginning of its hash."""
        return f"{self.name} (sha256 {sha256(self.content.encode()).hexdigest()[:16]})"


def load_text(file: str | None) -> Text:
    """The text in a UTF-8 file, or the one that comes with the package.

    Raises:
        UsageError: it cannot be read, is not UTF-8, or is too short.
    """
    if file is None:
        ours = importlib.resources.files("abliterate.evaluate") / "data" / "text.txt"
        return Text("built-in text", ours.read_text(encoding="utf-8"))
    try:
        content = Path(file).expanduser().read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"--text {file}: cannot be read ({error.strerror}); give a file of plain text") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"--text {file}: not UTF-8 at byte {error.start}; expected a file of plain text") from None
    if (n := len(content.strip())) < LEAST_CHARACTERS:
        raise UsageError(f"--text {file}: {n} characters; at least {LEAST_CHARACTERS} are needed, such as two pages")
    return Text(Path(file).name, content)


def windows(tokenizer: Tokenizer, text: Text) -> Rows:
    """The text's tokens, without a chat template, in windows of nearly equal size, each behind BOS if there is one."""
    ids: list[int] = tokenizer(text.content, add_special_tokens=False, verbose=False)["input_ids"]
    bos = tokenizer.bos_token_id
    begins = [bos] if isinstance(bos, int) and tokenizer("a")["input_ids"][:1] == [bos] else []
    n = -(-len(ids) // (WINDOW - len(begins)))
    cuts = [round(i * len(ids) / n) for i in range(n + 1)]
    return [begins + ids[start:stop] for start, stop in pairwise(cuts)]


def nll(model: AnyModel, rows: Rows, progress: Progress = silent) -> npt.NDArray[np.float64]:
    """`[n]` summed −log p of each row's tokens but the first, which nothing predicts."""
    found, longest = np.zeros(len(rows)), max(map(len, rows))
    # One by one: the logits of a whole vocabulary at every token are large.
    for batch, logits in forward(model, batches(model, rows, 1, longest), tokens=longest, progress=progress):
        (index,) = batch.indices
        target = torch.tensor(rows[index][1:], device=logits.device)[:, None]
        found[index] = -log_probs(logits[0, -len(rows[index]) : -1]).gather(-1, target).double().sum().item()
        del logits  # before the next ones are there
    return found


def text_perplexity(base: AnyModel | None, edited: AnyModel, text: Text, steps: Steps) -> Metric:
    """exp of the mean −log p over all tokens of the text, bootstrap over windows, the same ones for both models."""
    rows = windows(edited.chat.tokenizer, text)
    tokens = np.array([len(row) - 1 for row in rows], np.float64)
    models = [model for model in (base, edited) if model is not None]
    step = steps("perplexity of a text", len(models) * len(rows))
    found = [np.stack([nll(model, rows, step), tokens], 1) for model in models]
    values = [bootstrap(columns, _perplexity) for columns in found]
    how = f"of {tokens.sum():.0f} tokens of plain text in windows of at most {WINDOW}, n of them"
    before = None
    if base is not None:
        before = values[0]
        ratio = bootstrap(np.concatenate(found, 1), lambda c: _perplexity(c[:, 2:]) / _perplexity(c[:, :2]))
        how += f"; edited over base {ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}], paired"
    return Metric.of("perplexity_text", text.source, before, values[-1], len(rows), f"{how}; bootstrap 95%")


def _perplexity(columns: npt.NDArray[np.float64]) -> float:
    """From −log p and number of tokens of each window, `[n, 2]`."""
    return float(np.exp(columns[:, 0].sum() / columns[:, 1].sum()))
