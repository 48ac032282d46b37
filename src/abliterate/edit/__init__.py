"""Steps 3 and 4: which weights write to the residual stream, the projection, the plan, applying it.

Never knows prompts or evaluation.
"""

from abliterate.edit.apply import apply_edit
from abliterate.edit.plan import EditPlan, plan_edit
from abliterate.edit.shard import EditRecord

__all__ = ["EditPlan", "EditRecord", "apply_edit", "plan_edit"]
