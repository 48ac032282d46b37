"""What heretic would edit of the tiny checkpoints of the sweep, and what leak it leaves.

uv run --no-project --with heretic-llm --with-editable . python bench/heretic_architectures.py [TYPE ...]

Its own code finds the modules and makes the edit, at weight 1 in every layer and without its search; the stream is
measured as in the sweep. It never edits embeddings, so the leak is given twice: as it is, and of the blocks alone, the
direction taken out of what enters the first block. Without TYPE all are run and docs/heretic.md is written.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context, set_forkserver_preload
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import sweep_architectures as sweep
from transformers import CONFIG_MAPPING

from abliterate.architecture.probe import random_unit
from abliterate.architecture.stream import Stream, find_stream
from abliterate.architecture.twin import build_twin
from abliterate.errors import AbliterateError

PAGE = Path(__file__).parent.parent / "docs" / "heretic.md"
EXACT = sweep.EXACT

INTRODUCTION = """\
# The same architectures, edited by heretic

Written by `uv run --no-project --with heretic-llm --with-editable . python bench/heretic_architectures.py`: heretic
{version} with transformers {library} on the tiny checkpoints of [architectures.md](architectures.md), those types that
this transformers has. Its own code finds the modules and makes the edit, at weight 1 in every layer and without its
search. The leak is the largest share of a random direction in the stream, before and after. heretic never edits
embeddings; *blocks* is the leak with the direction taken out of what enters the first block.

{n} types: {counts}.

| type | result | modules edited | leak | blocks | why |
| --- | --- | --- | --- | --- | --- |
"""


@dataclass(frozen=True)
class Row:
    """One type: the modules it edits, the direction's share in the stream before and after, and of blocks alone."""

    kind: str
    modules: str = "–"
    before: float = 0.0
    after: float = 0.0
    blocks: float = 0.0
    why: str = ""

    @property
    def verdict(self) -> str:
        """In one word."""
        if self.why:
            return "fails"
        return "exact" if self.after <= EXACT else "blocks exact" if self.blocks <= EXACT else "leaks"

    @property
    def line(self) -> str:
        """A line of the table."""
        leak = f"{self.before:.1e} → {self.after:.1e} | {self.blocks:.1e}" if self.before else "– | –"
        return f"| `{self.kind}` | {self.verdict} | {self.modules} | {leak} | {self.why} |"


def one(kind: str) -> Row:
    """A type as `_one` finds it, or why there is nothing to measure."""
    try:
        return _one(kind)
    except (AbliterateError, ValueError, TypeError, AttributeError, LookupError, RuntimeError, ImportError) as error:
        return Row(kind, why=f"not built ({_short(error)})")


def _one(kind: str) -> Row:
    """Build a type as the sweep does, let heretic edit it, and measure."""
    from heretic.config import RowNormalization
    from heretic.model import AbliterationParameters, Model

    torch.set_num_threads(1)
    twin = build_twin(CONFIG_MAPPING[kind](**sweep.SETTINGS.get(kind, {}))).float()
    with torch.no_grad():
        stream = find_stream(twin)
        r = random_unit(stream.d_model)
        before = stream.share(r)
        peer: Any = Model.__new__(Model)
        peer.model, peer.settings = twin, SimpleNamespace(row_normalization=RowNormalization.NONE)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                peer._apply_lora()
                layers = range(len(peer.get_layers()))
                edits = [item for i in layers for item in peer.get_layer_modules(i).items()]
                counts = Counter(name for name, modules in edits for _ in modules)
                full = AbliterationParameters(
                    max_weight=1.0, max_weight_position=0.0, min_weight=1.0, min_weight_distance=1e9
                )
                directions = r.float().repeat(len(layers) + 1, 1)
                peer.abliterate(directions, None, dict.fromkeys(counts, full))
                edited = peer.model.merge_and_unload()
        except (AssertionError, AttributeError, ValueError, RuntimeError, TypeError, LookupError) as error:
            return Row(kind, before=before, after=before, blocks=before, why=_short(error))
        found = find_stream(edited)
        named = ", ".join(f"{name} x {n}" for name, n in sorted(counts.items()))
        return Row(kind, named, before, found.share(r), _of_blocks(found, r))


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]}".replace("|", "/")


def _of_blocks(stream: Stream, r: torch.Tensor) -> float:
    """The share of `r` where what enters the first block has none of it."""
    first = stream.calls[min(stream.calls)]

    def clean(_module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[first.stream] if isinstance(first.stream, int) else kwargs[first.stream]
        unit = r.to(hidden.dtype)
        left = hidden - (hidden @ unit)[..., None] * unit
        if isinstance(first.stream, int):
            return (*args[: first.stream], left, *args[first.stream + 1 :]), kwargs
        return args, {**kwargs, first.stream: left}

    handle = first.block.register_forward_pre_hook(clean, with_kwargs=True, prepend=True)
    try:
        return max(float((h @ r.double()).abs().max() / h.norm(dim=-1).mean()) for h in stream.states()[1:])
    finally:
        handle.remove()


def alone(kind: str) -> Row:
    """One type in a process of its own."""
    with ProcessPoolExecutor(1, get_context("forkserver"), sweep._quietly_on_one_thread) as worker:
        try:
            return worker.submit(one, kind).result(timeout=300)
        except (BrokenProcessPool, TimeoutError) as error:
            return Row(kind, why=f"its process was ended ({type(error).__name__})")


def main() -> None:
    """Run the types named, or all of them and write the page."""
    set_forkserver_preload(["heretic.model", "abliterate.architecture.learn"])
    with ThreadPoolExecutor(os.cpu_count()) as workers:
        rows = []
        for row in workers.map(alone, sys.argv[1:] or sweep.kinds()):
            rows.append(row)
            print(row.line, flush=True)
    if sys.argv[1:]:
        return
    counts = ", ".join(f"{n} {verdict}" for verdict, n in Counter(r.verdict for r in rows).most_common())
    peer, library = version("heretic-llm"), version("transformers")
    text = INTRODUCTION.format(version=peer, library=library, n=len(rows), counts=counts)
    PAGE.write_text(text + "\n".join(row.line for row in rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
