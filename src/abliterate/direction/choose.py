"""Choose one direction by what it does: ablated it must stop refusals, added it must cause them, cheaply.

Owns the causal test and its rounds; never sees the prompts that the means came from, nor any text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from abliterate.direction.direction import Direction
from abliterate.direction.refusal_score import refusal_score
from abliterate.errors import VerifyError
from abliterate.model.batches import Batch, pad_left
from abliterate.model.hooks import ablate, add_vectors
from abliterate.model.load import ChatModel
from abliterate.model.progress import Progress, silent
from abliterate.model.run import next_token_log_probs
from abliterate.model.sites import WriterSite

#: Candidates that go from the first, rough round into the full test.
_FINALISTS = 12
#: Prompts of the rough round.
_ROUGH = 8
#: Layers from this share of the depth on are too close to the output to carry a cause.
DEEPEST = 0.8
#: Share of the gap between harmless and harmful scores that adding a cause must close.
_LEAST_RISE = 0.1
#: Bound on first-token KL(base‖ablated) on harmless prompts, in nats.
MAX_KL = 0.2


@dataclass(frozen=True)
class Trial:
    """What the causal test needs: the hooked model, where the stream is written, validation rows and tokens."""

    model: ChatModel
    sites: Sequence[WriterSite]
    harmful: list[list[int]]
    harmless: list[list[int]]
    tokens: list[int]
    batch_size: int
    strength: float = 1.0


def choose(
    trial: Trial, candidates: list[Direction], max_kl: float = MAX_KL, progress: Progress = silent
) -> tuple[Direction, list[Direction]]:
    """The candidate that lowers the refusal score most within the bounds, and all finalists with their scores.

    After Arditi et al. 2024 (arXiv 2406.11717, appendix C): minimise the refusal score of harmful prompts
    under ablation, such that adding the direction makes harmless prompts score above zero and KL stays
    under `max_kl`. Where no candidate's addition crosses zero, it must at least close a tenth of the gap between
    harmless and harmful scores. A rough round
    on a few prompts picks the finalists; all rows of a batch carry candidates of their own.

    Raises:
        VerifyError: no candidate passes; says which bound failed.
    """
    base_harmful = _base_scores(trial, trial.harmful)
    base_harmless = _base_scores(trial, trial.harmless)
    rough = trial.harmful[:: max(1, len(trial.harmful) // _ROUGH)][:_ROUGH]
    first = _ablated_scores(trial, candidates, rough, progress)
    order = np.argsort(first, kind="stable")[:_FINALISTS]
    finalists = [candidates[i] for i in order]
    ablated = _ablated_scores(trial, finalists, trial.harmful, progress)
    kl = _kl(trial, finalists, progress)
    added = _added_scores(trial, finalists, progress)
    scored = [
        dataclasses.replace(
            direction,
            scores={
                "base_harmful": base_harmful, "base_harmless": base_harmless,
                "ablated": float(ablated[i]), "added": float(added[i]), "kl": float(kl[i]),
            },
        )
        for i, direction in enumerate(finalists)
    ]  # fmt: skip
    return _pick(scored, base_harmful, base_harmless, max_kl), scored


def _pick(scored: list[Direction], base_harmful: float, base_harmless: float, max_kl: float) -> Direction:
    """The finalist with the lowest ablated score among those that pass every bound."""
    falls = [d for d in scored if d.scores["ablated"] < base_harmful]
    if not falls:
        raise VerifyError(
            f"no candidate direction lowers the refusal score when ablated (base {base_harmful:.2f}); "
            "one direction does not carry this model's refusal"
        )
    floor = base_harmless + _LEAST_RISE * (base_harmful - base_harmless)
    causes = [d for d in falls if d.scores["added"] > 0] or [d for d in falls if d.scores["added"] > floor]
    if not causes:
        raise VerifyError(
            "no candidate direction raises the refusal score of harmless prompts when added "
            f"(base {base_harmless:.2f}); what was found is a correlate of refusal, not its cause"
        )
    cheap = [d for d in causes if d.scores["kl"] <= max_kl]
    if not cheap:
        least = min(causes, key=lambda d: d.scores["kl"])
        raise VerifyError(
            f"every candidate that stops refusals moves harmless answers by more than {max_kl} nats (the least: layer "
            f"{least.layer}, position {least.position}, KL {least.scores['kl']:.3f}); raise --max-kl to accept it"
        )
    return min(cheap, key=lambda d: d.scores["ablated"])


def measure(trial: Trial, direction: Direction) -> Direction:
    """The causal test of one direction that a person named, its figures in `scores`; nothing is bounded."""
    scores = {
        "base_harmful": _base_scores(trial, trial.harmful),
        "base_harmless": _base_scores(trial, trial.harmless),
        "ablated": float(_ablated_scores(trial, [direction], trial.harmful, silent)[0]),
        "added": float(_added_scores(trial, [direction], silent)[0]),
        "kl": float(_kl(trial, [direction], silent)[0]),
    }
    return dataclasses.replace(direction, scores=scores)


def passes(n_candidates: int, n_harmful: int, n_harmless: int) -> int:
    """How many rows `choose` runs, for a progress bar."""
    finalists = min(_FINALISTS, n_candidates)
    return n_candidates * min(_ROUGH, n_harmful) + finalists * (n_harmful + 2 * n_harmless)


def _base_scores(trial: Trial, rows: list[list[int]]) -> float:
    """Mean refusal score of the model as it is."""
    total = 0.0
    for start in range(0, len(rows), trial.batch_size):
        batch = _pad(trial, rows[start : start + trial.batch_size])
        total += refusal_score(next_token_log_probs(trial.model, batch), trial.tokens).sum().item()
    return total / len(rows)


def _ablated_scores(
    trial: Trial, directions: list[Direction], rows: list[list[int]], progress: Progress
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """`[candidates]` mean refusal score of `rows` with each direction ablated everywhere."""
    totals = np.zeros(len(directions))
    for pairs in _jobs(trial, len(directions), rows):
        batch = _pad(trial, [rows[p] for _, p in pairs])
        vectors = _vectors(trial, directions, [c for c, _ in pairs])
        with ablate(trial.model, trial.sites, vectors, trial.strength):
            scores = refusal_score(next_token_log_probs(trial.model, batch), trial.tokens)
        np.add.at(totals, [c for c, _ in pairs], scores.double().cpu().numpy())
        progress(len(pairs))
    return totals / len(rows)


def _added_scores(
    trial: Trial, directions: list[Direction], progress: Progress
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """`[candidates]` mean refusal score of harmless prompts with `r` added at the layer it was found at."""
    totals = np.zeros(len(directions))
    for pairs in _jobs(trial, len(directions), trial.harmless):
        batch = _pad(trial, [trial.harmless[p] for _, p in pairs])
        chosen = [c for c, _ in pairs]
        scales = torch.tensor([directions[c].scale for c in chosen], device=trial.model.device)
        vectors = _vectors(trial, directions, chosen) * scales[:, None]
        with add_vectors(trial.model, [directions[c].layer for c in chosen], vectors):
            scores = refusal_score(next_token_log_probs(trial.model, batch), trial.tokens)
        np.add.at(totals, chosen, scores.double().cpu().numpy())
        progress(len(pairs))
    return totals / len(trial.harmless)


def _kl(trial: Trial, directions: list[Direction], progress: Progress) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """`[candidates]` mean first-token KL(base‖ablated) on harmless prompts, in nats."""
    totals = np.zeros(len(directions))
    by_length = sorted(range(len(trial.harmless)), key=lambda p: len(trial.harmless[p]))
    for start in range(0, len(by_length), trial.batch_size):
        rows = [trial.harmless[p] for p in by_length[start : start + trial.batch_size]]
        batch = _pad(trial, rows)
        base = next_token_log_probs(trial.model, batch)
        for c, direction in enumerate(directions):
            with ablate(trial.model, trial.sites, torch.from_numpy(direction.vector), trial.strength):
                edited = next_token_log_probs(trial.model, batch)
            totals[c] += (base.exp() * (base - edited)).sum().item()
            progress(len(rows))
    return totals / len(trial.harmless)


def _jobs(trial: Trial, n_directions: int, rows: list[list[int]]) -> list[list[tuple[int, int]]]:
    """All (candidate, prompt) pairs in batches, prompts of like length together."""
    by_length = sorted(range(len(rows)), key=lambda p: len(rows[p]))
    pairs = [(c, p) for p in by_length for c in range(n_directions)]
    return [pairs[i : i + trial.batch_size] for i in range(0, len(pairs), trial.batch_size)]


def _pad(trial: Trial, rows: list[list[int]]) -> Batch:
    return pad_left(rows, trial.model.pad_id, trial.model.device)


def _vectors(trial: Trial, directions: list[Direction], chosen: list[int]) -> torch.Tensor:
    """`[rows, d_model]`: the direction of each row."""
    return torch.from_numpy(np.stack([directions[c].vector for c in chosen])).to(trial.model.device)
