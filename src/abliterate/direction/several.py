"""Several directions: what the first ones leave behind, found again on the model with them ablated, and when to stop.

Owns the order, and the rule by which another direction is worth its place; never knows prompts or texts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from abliterate.direction.choose import Choice, Float32Array, Float64Array, Trial, causes, certain, preference, ranked
from abliterate.direction.direction import METHOD, Direction
from abliterate.model.progress import Steps, no_steps

#: The candidates that means on the model give, with what a trial has removed ablated in it.
Again = Callable[[Trial], list[Direction]]
#: A candidate of which less than this share is left behind the directions before it is mostly their rounding.
_LEFT = 0.1
#: A score of the causal test, and the prompts of the score it is to be compared with.
_MOVES = (("ablated", "harmful"), ("added", "harmless"))


def extended(trial: Trial, first: Choice, again: Again, most: int, max_kl: float, steps: Steps = no_steps) -> Choice:
    """A choice with up to `most - 1` directions behind its own, as one orthonormal basis `[k, d_model]`.

    With all before it ablated, means are taken `again`, and the best candidate of the same causal test is kept if it
    passes all bounds and is worth its place: the refusals that first tokens let expect on the n harmful validation
    prompts, `Σ sigmoid(score)`, must fall by one or more, and surely (their differences, paired, by more than 1.96
    standard errors). KL counts all directions together. The first candidate that fails ends it, as `stopped` says.
    """
    parts, stopped = [first.direction], ""
    while len(parts) < most and not stopped:
        behind = after(trial, parts)
        found = successor(behind, again, max_kl, steps)
        stopped = _why_not(behind, found, max_kl)
        if found is not None and not stopped:
            parts.append(found)
    return first._replace(direction=together(parts, stopped))


def chain(trial: Trial, again: Again, most: int, max_kl: float, steps: Steps = no_steps) -> list[Direction]:
    """`most` directions, each the best behind all before it, whatever it is worth; fewer where nothing is left."""
    parts = list[Direction]()
    while len(parts) < most and (found := successor(after(trial, parts), again, max_kl, steps)) is not None:
        parts.append(found)
    return parts


def after(trial: Trial, parts: Sequence[Direction]) -> Trial:
    """The same test of candidates behind these directions."""
    return dataclasses.replace(trial, removed=basis(parts)) if parts else trial


def basis(parts: Sequence[Direction]) -> Float32Array:
    """`[k, d_model]`: single directions as rows."""
    return np.stack([d.vector for d in parts])


def together(parts: Sequence[Direction], stopped: str = "") -> Direction:
    """Directions found one behind the other as one: scores from the model as it is to all of them ablated.

    `added` and `rise` are the first one's.
    """
    first, last = parts[0], parts[-1].scores
    if len(parts) == 1:
        return dataclasses.replace(first, stopped=stopped)
    scores = first.scores | {k: last[k] for k in ("ablated", "kl")}
    method = f"{len(parts)} directions, each found with those before it ablated: {METHOD}"
    return dataclasses.replace(
        first, vector=basis(parts), method=method, scores=scores, parts=told(parts), stopped=stopped
    )


def told(parts: Sequence[Direction]) -> list[dict[str, Any]]:
    """Of each where it was found and what it scored behind those before it, as `Direction.parts` holds it."""
    return [{k: d.where[k] for k in ("layer", "position", "scale", "scores")} for d in parts]


def successor(trial: Trial, again: Again, max_kl: float, steps: Steps = no_steps) -> Direction | None:
    """The best candidate behind what a trial has removed, orthogonal to that; None where nothing tells the sets apart.

    The best by `preference` among those that pass all bounds; where none does, among those within
    `max_kl`; where none is, the one of least KL.
    """
    found = orthogonal(again(trial), trial.removed)
    if not found:
        return None
    tested, *_ = ranked(trial, found, max_kl, steps)
    passing = [d for d in tested if _passes(d, max_kl)]
    within = [d for d in tested if d.scores["kl"] <= max_kl]
    if passing or within:
        return min(passing or within, key=preference)
    return min(tested, key=lambda d: d.scores["kl"])


def orthogonal(found: Sequence[Direction], removed: Float32Array | None) -> list[Direction]:
    """Candidates without their part in the span of `removed` `[k, d_model]`, as unit vectors again.

    Those that lie in the span, but for a tenth of their norm, are left out.
    """
    if removed is None:
        return list(found)
    wide, kept = removed.astype(np.float64), list[Direction]()
    for d in found:
        rest = d.vector.astype(np.float64)
        for _ in range(2):  # once more for what rounding left
            rest -= (wide @ rest) @ wide
        share = float(np.linalg.norm(rest))
        if share > _LEFT:
            unit = (rest / share).astype(np.float32)
            kept.append(dataclasses.replace(d, vector=unit, scale=d.scale * share))
    return kept


def saved(before: Float64Array, ablated: Float64Array) -> tuple[float, bool]:
    """Refusals that first tokens no longer let expect, from scores `[n]` before and after; whether that is worth it.

    `Σ (sigmoid(before) − sigmoid(ablated))`: a refusal score is the log-odds of a refusal. Worth it is one refusal or
    more, if the mean of the differences is over 1.96 standard errors.
    """
    fewer = (torch.from_numpy(before).sigmoid() - torch.from_numpy(ablated).sigmoid()).numpy()
    return float(fewer.sum()), bool(certain(fewer) > 0 and fewer.sum() >= 1)


def _passes(d: Direction, max_kl: float) -> bool:
    scores = d.scores
    return scores["ablated"] < scores["base_harmful"] and causes(d) and scores["kl"] <= max_kl


def _why_not(trial: Trial, found: Direction | None, max_kl: float) -> str:
    """Why a direction is not worth its place behind what a trial has removed; "" if it is."""
    if found is None:
        return "behind these nothing tells harmful from harmless prompts"
    where = f"the next (layer {found.layer}, position {found.position})"
    if not _passes(found, max_kl):
        fall, rise = (found.scores[k] - found.scores[f"base_{of}"] for k, of in _MOVES)
        return (
            f"{where} fails the causal test: ablated it moves the refusal score by {fall:+.1f}, added by {rise:+.1f}, "
            f"at KL {found.scores['kl']:.3f}"
        )
    n = len(trial.harmful)
    (scores,), _ = trial.ablated([found], range(n), range(0))
    fewer, worth = saved(trial.base_harmful.double().cpu().numpy(), scores)
    if worth:
        return ""
    return f"{where} would save {fewer:.1f} refusals of {n} validation prompts, by their first tokens: no sure gain"
