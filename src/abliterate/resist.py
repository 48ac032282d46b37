"""`resist`: how much of a model's refusal survives directions found one behind the other; writes no file.

Owns the order of its steps; computes nothing itself.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from abliterate import steps as step
from abliterate.at_rest import find_model
from abliterate.checkpoint import open_checkpoint
from abliterate.contrast import Contrast, candidates_again, causal_test
from abliterate.direction.several import basis, chain, told
from abliterate.edit.plan import plan_edit
from abliterate.envelope import enveloped
from abliterate.errors import NoRefusalError, VerifyError
from abliterate.evaluate.resistance import COUNTS, Resistance, Survival
from abliterate.model.progress import Steps, no_steps
from abliterate.options import Options
from abliterate.roles import described, prompt_splits


@dataclass(frozen=True)
class Resisted:
    """The curve of one model, with where its directions were found (as `parts` of a direction) and the test sets."""

    model: str
    model_fingerprint: str
    curve: Resistance
    directions: list[dict[str, Any]]
    prompts: dict[str, dict[str, Any]]

    @property
    def as_dict(self) -> dict[str, Any]:
        """The result as JSON stores it."""
        figures = {"resistance": asdict(self.curve.resistance), "control": asdict(self.curve.control)}
        found = {k: v for k, v in asdict(self).items() if k != "curve"}
        return enveloped("resistance", {**found, **figures, **asdict(self.curve)})


def resist(model: str, *, directions: int = max(COUNTS), steps: Steps = no_steps, **options: Any) -> Resisted:
    """Find up to `directions` of `model`, each behind those before, and measure what is left of its refusal.

    All by hooks, at strength 1; as many random directions are the control. Takes the fields of `Options` as keywords.

    Raises:
        AbliterateError: as its kinds say; NoRefusalError where there is nothing to survive.
    """
    chosen = Options(directions=directions, **options)
    chosen.check()
    harmful, harmless = prompt_splits(chosen)
    source = find_model(model)
    checkpoint = open_checkpoint(source)
    plan = plan_edit(checkpoint, chosen.embeddings)
    step.check_site(checkpoint, chosen)
    memory = step.bounded_memory([checkpoint], chosen)
    judge = step.pick_judge(chosen, steps)
    loaded = step.load(source, chosen, memory)
    observed = step.observe(loaded, checkpoint, harmful, harmless, chosen, steps)
    if not observed.tokens:
        raise NoRefusalError(f"{model}: no refusals were seen, so there is nothing whose survival could be measured")
    given = loaded, plan, Contrast(observed, harmful, harmless), chosen
    found = chain(causal_test(*given), candidates_again(*given, steps), chosen.directions, chosen.max_kl, steps)
    if not found:
        raise VerifyError(f"{model}: harmful and harmless requests differ at no layer and position; give others")
    asked = Survival(
        loaded, plan.sites, harmful.test, harmless.test, chosen.max_new_tokens, chosen.batch_size, judge, steps
    )
    curve = asked.curve(basis(found), chosen.seed, chosen.max_kl)
    return Resisted(
        model, checkpoint.fingerprint, curve, told(found),
        {"harmful": described(harmful.test), "harmless": described(harmless.test)},
    )  # fmt: skip
