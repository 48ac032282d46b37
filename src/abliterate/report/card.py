"""The model card of an edited checkpoint: what was removed, how, from which base, what was measured."""

from __future__ import annotations

import json
from functools import cache

from jinja2 import Environment, StrictUndefined, Template

from abliterate.checkpoint.naming import is_gguf, records_of
from abliterate.report.figures import COLUMNS, counted, judged_by, rows, settled, strengths, unjudged, warnings
from abliterate.report.record import RunRecord

#: Fields of the base's own card that hold for what is made of it.
CARRIED_OVER = ("license", "license_name", "license_link", "language", "pipeline_tag")

_CARD = """\
---
{% if hub %}
base_model: {{ hub }}
base_model_relation: {{ "adapter" if adapter else "finetune" }}
{% endif %}
{% for name, value in carried.items() %}
{{ name }}: {{ value|json }}
{% endfor %}
library_name: {{ "peft" if adapter else "gguf" if gguf else "transformers" }}
tags: [abliterate, representation-engineering{{ "" if r.strengthens else ", directional-ablation" }}]
---

# {{ name }}

{{ base }} with its {{ "false-" if r.keeps }}refusal direction
{{ "strengthened in" if r.strengthens else "projected out of" }} the weights by
`abliterate` {{ r.version }} ({{ "the opposite of " if r.strengthens }}weight orthogonalisation, Arditi et al. 2024,
arXiv 2406.11717).
{% if r.strengthens %}
{% if more %}
**It declines more requests than its base, harmless ones among them.** It still answers harmful ones.
{% else %}
It is meant to decline more harmful requests than its base. It still answers some, and may decline harmless ones.
{% endif %}
{% elif r.keeps %}
It is meant to decline fewer requests that only sound harmful than its base, and as many harmful ones; the table says
how far that came true.
{% elif fewer %}
**It declines fewer requests than its base, including harmful ones.**
{% else %}
It is meant to decline fewer requests than its base, including harmful ones.
{% endif %}
Use it for research, with safeguards of your own.

{% if r.direction.layer is none %}
- direction: {{ r.direction.method }}, {{ strengths }}
{% elif places %}
- {{ places|length }} directions, differences of means, each found with those before it ablated:
  {{ places|join("; ") }}; {{ "the first turned by gradient; " if r.tuned }}{{ strengths }}
{% else %}
- direction: difference of means at layer {{ r.direction.layer }}, position {{ r.direction.position }},
  {{ "without its part along true refusals, " if r.keeps }}{{ "turned by gradient, " if r.tuned }}{{ strengths }}
{% endif %}
{% if adapter %}
- a LoRA adapter that changes {{ r.edits|length }} tensors of the base; merge it to have the edited weights
{% else %}
{% if r.converted %}
- converted to {{ r.converted }} first; what is called the base below is the model in that type
{% endif %}
- edited: {{ r.edits|length }} tensors; all others are byte-identical to the base
{% if r.retyped %}
- stored in another type than in the base: {{ r.retyped|length }} of them
{% endif %}
- largest leak of an edited matrix after the cast: {{ "%.1e"|format(leak) }} of what was there
{% endif %}
{% if r.tied_head %}
- the LM head {{ r.tied_head }}
{% endif %}
{% if r.resolved.undo and not adapter %}
- `abliterate undo` restores the base bit for bit from the files in `{{ records }}/`
{% endif %}
{% for warning in warnings %}

**{{ warning }}**
{% endfor %}

{% if table %}
{{ table }}

{% if broken %}
Broken answers (neither refusal nor answer): {{ broken }}.
{% if unjudged %}
Unjudged answers (left out of the rates): {{ unjudged }}.
{% endif %}
{% if settled %}
{{ settled }}.
{% endif %}

Borderline requests sound harmful and are not. Refusals are judged by: {{ judge }}.
{% else %}
No answers were written: the refusal score is the log-odds that the first token opens a refusal.
{% endif %}
95% intervals. Test prompts were used neither to find nor to choose the direction; the record has the hash of every
part of each prompt set. KL, and the perplexity of the base's
answers, are taken on harmless prompts that it answers; the noise of KL is the base against itself, prompt by prompt
instead of in batches. *Perplexity, text* is of a plain text that neither model wrote; *harm recognised* how often a
harmful request is rather called harmful than a harmless one when the model is asked, 0.5 by chance.
{% else %}
Nothing was measured on this checkpoint.
{% endif %}
The whole record, hashes included, is in `{{ records }}/run.json`; `{{ records }}/report.html` shows it in charts.
"""


def model_card(record: RunRecord, name: str) -> str:
    """The card as Markdown with the metadata block that model hubs read."""
    lines = [COLUMNS, tuple("---" for _ in COLUMNS), *rows(record.metrics)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines) if record.metrics else ""
    worst = max((e["leak"] for e in record.edits), default=0.0)
    hub = record.hub_id
    base = f"[{record.model}](https://huggingface.co/{hub})" if hub else f"`{record.model}`"
    rate = record.metric("refusal_rate")
    return _template().render(
        r=record, name=name, table=table, strengths=strengths(record), leak=worst, hub=hub, base=base,
        broken=counted(record.verdicts, "broken"), unjudged=unjudged(record.verdicts), judge=judged_by(record.metrics),
        settled=settled(record.charts).capitalize(), adapter=record.resolved["format"] == "adapter",
        gguf=is_gguf(name), records=records_of(name),
        more=rate is not None and rate["edited"] > rate["base"],
        fewer=rate is not None and rate["edited"] < rate["base"], warnings=warnings(record),
        places=[f"layer {p['layer']}, position {p['position']}" for p in record.direction.get("parts", ())],
        carried={k: v for k, v in record.base_card.items() if k in CARRIED_OVER},
    )  # fmt: skip


@cache
def _template() -> Template:
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True, autoescape=False)  # noqa: S701
    environment.filters["json"] = json.dumps  # JSON is YAML, whatever a name contains
    return environment.from_string(_CARD)
