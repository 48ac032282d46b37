"""Gradients through a frozen model: the same however the rows are run, and equal to what small changes do."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from abliterate.checkpoint import open_checkpoint
from abliterate.edit.plan import plan_edit
from abliterate.model import gradient
from abliterate.model.gradient import backward, tokens_at_once
from abliterate.model.hooks import ablate
from abliterate.model.load import ChatModel, load_model
from tests.tiny import FAMILIES

Tiny = Callable[..., Path]
#: They begin alike, and differ in length.
ROWS = [[0, 3, 40, 41, 42, 43, 5, 4], [0, 3, 40, 41, 42, 50, 51, 52, 5, 4, 31], [0, 3, 40, 41, 42, 60, 5, 4]]
KEEP = 3


class _Changed:
    """A model with a strength for every site and a direction, both wanting gradients."""

    def __init__(self, folder: Path) -> None:
        self.model: ChatModel = load_model(folder, device="cpu", dtype="float32")
        self.sites = plan_edit(open_checkpoint(folder)).sites
        torch.manual_seed(0)
        self.direction = torch.nn.functional.normalize(torch.randn(32), dim=0).requires_grad_()
        self.strengths = torch.rand(len(self.sites), requires_grad=True)

    def hooks(self) -> AbstractContextManager[None]:
        return ablate(self.model, self.sites, self.direction, self.strengths)

    def loss(self, indices: list[int], logits: torch.Tensor) -> torch.Tensor:
        """Something that weighs rows and positions differently."""
        weights = torch.tensor([1.0 + i for i in indices])[:, None] * torch.arange(1.0, KEEP + 1)
        return (weights * logits.float().logsumexp(-1)).sum() + logits.float()[..., 7].square().sum()

    def gradients(self, at_once: int | None) -> tuple[float, torch.Tensor, torch.Tensor]:
        """The summed loss, and both gradients."""
        self.direction.grad = self.strengths.grad = None
        total = backward(self.model, ROWS, KEEP, self.loss, self.hooks, at_once)
        assert self.direction.grad is not None and self.strengths.grad is not None
        return total, self.direction.grad, self.strengths.grad


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_openings_small_batches_and_recomputed_blocks_give_the_gradient_of_whole_rows(
    family: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = _Changed(tiny(family, tied=True, dtype=torch.float32))
    with monkeypatch.context() as alone:
        alone.setattr(gradient, "opening_of", lambda *_: None)
        whole = changed.gradients(1)
    assert whole[1].norm() > 0 and (whole[2] != 0).all()
    for at_once in (1, 12, 1000, None):
        total, *both = changed.gradients(at_once)
        assert total == pytest.approx(whole[0], rel=1e-4)
        for found, expected in zip(both, whole[1:], strict=True):
            assert (found - expected).norm() < 1e-3 * expected.norm(), at_once
    assert all(p.grad is None for p in changed.model.model.parameters())


def test_the_gradient_is_what_a_small_change_does(tiny: Tiny) -> None:
    changed = _Changed(tiny("llama", tied=True, dtype=torch.float32))
    _, _, by_strength = changed.gradients(1000)
    for site in (0, 3):
        either = []
        for sign in (1, -1):
            with torch.no_grad():
                changed.strengths[site] += sign * 1e-2
            either.append(changed.gradients(1000)[0])
            with torch.no_grad():
                changed.strengths[site] -= sign * 1e-2
        slope = (either[0] - either[1]) / 2e-2
        assert slope == pytest.approx(by_strength[site].item(), rel=0.05, abs=0.05 * by_strength.abs().max().item())


def test_little_memory_makes_batches_small_and_then_blocks_run_again(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = _Changed(tiny("llama", dtype=torch.float32))

    def at_once(free: int) -> int | None:
        monkeypatch.setattr(gradient, "available", lambda _device: free)
        return tokens_at_once(changed.model, ROWS, KEEP, changed.hooks)

    assert at_once(10**12) == 768
    some = at_once(2_000_000)
    assert some is not None and 11 <= some < 768
    assert at_once(1000) is None


def test_recomputed_blocks_keep_less(tiny: Tiny) -> None:
    changed = _Changed(tiny("llama", dtype=torch.float32, n_layers=6))

    def kept() -> int:
        sizes = dict[int, int]()

        def count(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t), changed.hooks():
            changed.model.model(torch.tensor([ROWS[0] * 8]), use_cache=False)
        return sum(sizes.values())

    changed.model.model.requires_grad_(False)
    usual = kept()
    with gradient.recomputed(changed.model):
        less = kept()
    assert less < usual / 2
    assert kept() == usual
