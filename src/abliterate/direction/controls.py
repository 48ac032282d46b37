"""Controls: directions that carry no refusal, taken out with the strengths of the one that was chosen.

Owns which these are, and whether the chosen one does more than they; never knows how it was found, nor weights.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from abliterate.activations.collect import collect_sets
from abliterate.direction.choose import Trial, certain
from abliterate.direction.direction import Direction, candidates
from abliterate.model.progress import Steps, no_steps
from abliterate.prompts import PromptSet

#: How many random ones.
RANDOM = 4
#: Harmful and harmless prompts of the causal test that they are tried on: what they do is far from what a cause does.
PROMPTS = 16, 8


def controls(
    trial: Trial, chosen: Direction, harmless: PromptSet, seed: int, steps: Steps = no_steps
) -> dict[str, Any]:
    """What ablating random directions, and one between parts of a harmless set, does beside ablating the chosen one.

    `chosen`, `harmless` and each of `random` hold mean refusal score of harmful prompts and mean first-token
    KL(base‖ablated) on harmless ones, nats; `base` is the model's own score. `margin` is how far the chosen one moves
    the score beyond `best`, the control that moves it furthest, downwards or, at a strength below 0, upwards: the mean
    over the same prompts. `margin_low` is that less 1.96 standard errors: at 0 or below, what the chosen one does may
    be what any direction does.
    """
    between = _between(trial, chosen, harmless, steps)
    tried = [chosen, *random_like(chosen, RANDOM, seed), *([between] if between is not None else [])]
    trial = dataclasses.replace(trial, harmful=trial.harmful[: PROMPTS[0]], harmless=trial.harmless[: PROMPTS[1]])
    whole = range(len(trial.harmful)), range(len(trial.harmless))
    step = steps("trying the controls", len(tried) * sum(map(len, whole)))
    scores, kl = trial.ablated(tried, *whole, step)
    falls = np.sign(trial.strength) * (trial.base_harmful.double().cpu().numpy() - scores)
    best = 1 + int(falls[1:].mean(1).argmax())
    margin = falls[0] - falls[best]
    figures = [{"score": float(s), "kl": float(k)} for s, k in zip(scores.mean(1), kl.mean(1), strict=True)]
    return {
        "harmful_prompts": len(trial.harmful),
        "harmless_prompts": len(trial.harmless),
        "base": float(trial.base_harmful.mean()),
        "chosen": figures[0],
        "random": figures[1 : 1 + RANDOM],
        "harmless": figures[1 + RANDOM] if between is not None else None,
        "best": "random" if best <= RANDOM else "harmless",
        "margin": float(margin.mean()),
        "margin_low": certain(margin),
    }


def random_like(chosen: Direction, n: int, seed: int) -> list[Direction]:
    """`n` isotropic directions of the shape of `chosen`, orthonormal where that is several."""
    numbers = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        basis, _ = np.linalg.qr(numbers.standard_normal(np.atleast_2d(chosen.vector).shape).T)
        found.append(dataclasses.replace(_along(chosen, basis), method="random", scores={}, source={}))
    return found


def _along(chosen: Direction, basis: npt.NDArray[np.float64]) -> Direction:
    """Other directions `[d_model, k]` in the place of `chosen`, at every layer; nothing is left along them."""
    vector = basis.T.reshape(chosen.vector.shape).astype(np.float32)
    layers = None if chosen.layers is None else np.broadcast_to(vector, chosen.layers.shape)
    return dataclasses.replace(chosen, vector=vector, layers=layers, offset=0.0)


def _between(trial: Trial, chosen: Direction, harmless: PromptSet, steps: Steps) -> Direction | None:
    """The direction between two halves of a set at the layer and position of `chosen`, found as that was.

    Of `k` directions there are `k` of `k + 1` parts to the first, orthonormal. None where the set has fewer prompts
    than that, or its parts do not differ.
    """
    assert chosen.layer is not None  # a direction that was brought has no place to collect at
    n = len(np.atleast_2d(chosen.vector)) + 1
    if len(harmless) < n:
        return None
    parts = [harmless.take(list(range(i, len(harmless), n))) for i in range(n)]
    step = steps("collecting for the controls", len(harmless))
    depth = chosen.layer + 1
    first, *others = collect_sets(trial.model, parts, trial.batch_size, n_layers=depth, progress=step)
    found = [
        d.vector
        for other in others
        for d in candidates(other, first, depth)
        if (d.layer, d.position) == (chosen.layer, chosen.position)
    ]
    if len(found) < n - 1:
        return None
    basis, _ = np.linalg.qr(np.stack(found, axis=1).astype(np.float64))
    return _along(chosen, basis)
