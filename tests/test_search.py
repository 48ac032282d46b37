"""The comparison with heretic's search: who is ahead of whom, held-out prompts, one measure for all kinds of edits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from abliterate import at_rest
from abliterate.report.record import RunRecord
from bench import front, measure, search
from tests.conftest import Refusing
from tests.organism import HARMFUL_VERBS, HARMLESS_VERBS, requests


def figures(rate: float, kl: float) -> dict[str, Any]:
    """A model's figures, alike for all sets and judges."""
    interval = {"value": rate, "low": rate, "high": rate, "n": 10}
    cost = {"value": kl, "low": kl, "high": kl, "n": 10, "median": kl}
    kinds = ("kl_first", "kl_along", "kl_first_all")
    return {
        "refusals": {k: dict.fromkeys(front.JUDGES, interval) for k in (*front.AXES, "xstest_safe", "harmless")},
        **dict.fromkeys(kinds, cost), "kl_floor": 1e-4, "perplexity_ratio": cost | {"value": 1},
        "settings": {"tokens": 32, "system_prompt": None},
    }  # fmt: skip


def test_ahead_means_no_worse_on_both_axes_and_better_on_one() -> None:
    ours = figures(0.1, 0.02)
    others = {
        "both": figures(0.05, 0.01), "one": figures(0.1, 0.01), "same": figures(0.1, 0.02),
        "traded": figures(0.0, 0.03), "worse": figures(0.2, 0.02),
    }  # fmt: skip
    for found in front.ahead(ours, others).values():
        assert found == {"ahead": ["both", "one"], "behind": ["worse"]}
    assert front.pareto(others, "harmful") == ["both", "traded"]


def found_of(own: dict[str, Any], *trials: dict[str, Any]) -> dict[str, Any]:
    """What `bench/search.py` would have found, of trials that took 10, 20, … seconds behind 100 of setup."""
    settings = {"n_startup_trials": 60, "seed": 0, "max_response_length": 100, "batch_size": 8, "system_prompt": "Be."}
    described = [
        {
            "index": i, "seconds": 10.0 * i, "offered": i == 1, "refusals": i, "n_bad_prompts": 10,
            "kl_divergence": 0.1,
        }
        for i in range(1, len(trials) + 1)
    ]  # fmt: skip
    took = {"cpu_seconds": 1.0, "peak_bytes": 1e9, "load": 0.0}
    return {
        "heretic": {
            "version": "1", "settings": settings, "sessions": 1, "setup_seconds": 100.0, "trials": described, **took,
        },
        "ours": {"ours-0": {"options": "", "seconds": 60.0, "steps": {"tune": 50.0}, **took}},
        "measured": {
            "base": {"refusals": own["refusals"]}, "ours-0": own,
            **{f"heretic-{i:03d}": f for i, f in enumerate(trials, 1)},
        },
    }  # fmt: skip


def test_a_long_search_is_extrapolated_behind_its_setup_and_the_goals_follow_the_figures() -> None:
    found = found_of(figures(0.0, 0.01), figures(0.5, 0.1), figures(0.0, 0.005))
    took = front.times(found["heretic"])
    assert took["total"] == 100 + 10 + 20
    assert took["extrapolated"]["value"] == 100 + 200 * 15
    others = {"heretic-001": figures(0.5, 0.1), "heretic-002": figures(0.0, 0.005)}
    rows = front.goals(found["measured"]["ours-0"], found["ours"]["ours-0"], found["heretic"], others)
    met = {goal: verdict for goal, _, verdict in rows}
    assert met["less than 480 s"] == "met"
    assert met["at most 1/50 of 200 trials"] == "met"  # 3100 s against 50 × 60
    assert met["first-token KL at most 0.03"] == "met"
    assert met["no trial ahead on both axes (harmful_val, rules)"] == "**not met**"
    text = front.markdown(found)
    assert "1 of 2 trials is at least as good" in text
    assert "heretic-001 *" in text
    assert "heretic-002 |" in text
    picture = front.picture(found["measured"])
    assert picture.count("mark heretic") == 2 * 2 + 1  # in both panels, and in the key
    assert picture.count("mark ours") == 2 + 1
    assert picture.count("mark other") == 1


def test_heretic_judges_its_trials_on_prompts_it_finds_no_direction_on(tmp_path: Path) -> None:
    for kind, n in (("harmful", 251), ("harmless", 1000)):
        rows = "".join(json.dumps({"prompt": f"{kind} {i}\nof {n}"}) + "\n" for i in range(n))
        (tmp_path / f"{kind}_train.jsonl").write_text(rows)
    options = search.heretic_prompts(tmp_path, tmp_path)
    files = dict(zip(options[::2], options[1::2], strict=True))
    held = {name: (tmp_path / file).read_text().splitlines() for name, file in files.items()}
    assert {name.strip("-").removesuffix(".dataset"): len(lines) for name, lines in held.items()} == {
        "good-prompts": 400, "good-evaluation-prompts": 100, "bad-prompts": 151, "bad-evaluation-prompts": 100,
    }  # fmt: skip
    assert len({line for lines in held.values() for line in lines}) == 400 + 100 + 151 + 100


@pytest.fixture
def asked(tmp_path: Path) -> measure.Settings:
    """Prompts of the refusing model in the files that are measured on."""
    harmful, harmless = requests(HARMFUL_VERBS)[:12], requests(HARMLESS_VERBS)[:12]
    marked = [("unsafe", p) for p in harmful] + [("safe", p) for p in harmless]
    rows = {
        "harmful_val": [{"prompt": p} for p in harmful], "harmless_val": [{"prompt": p} for p in harmless],
        "xstest": [{"prompt": p, "label": label} for label, p in marked],
    }  # fmt: skip
    for name, lines in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return measure.Settings(data=str(tmp_path), tokens=8)


def test_folders_and_adapters_are_measured_alike_and_once(
    refusing: Refusing, finished: tuple[RunRecord, Path], asked: measure.Settings, tmp_path: Path
) -> None:
    direction = finished[1] / "abliteration" / "directions.safetensors"
    at_rest.edit(str(refusing.folder), direction, tmp_path / "adapter", format="adapter")
    edited = {"whole": finished[1], "adapter": tmp_path / "adapter"}
    found = measure.measure(refusing.folder, tmp_path / "out", edited, asked)
    for kind, rate in (("harmful", 1.0), ("xstest_unsafe", 1.0), ("harmless", 0.0), ("xstest_safe", 0.0)):
        assert found["base"]["refusals"][kind]["rules"]["value"] == rate
    assert "kl_first" not in found["base"]
    for name in edited:
        assert found[name]["refusals"]["harmful"]["rules"]["value"] == 0
        assert found[name]["kl_first"]["n"] == len(found[name]["kl_first"]["each"]) == 12
        assert found[name]["kl_first"]["value"] > 10 * found[name]["kl_floor"]
    whole, adapter = (found[name]["kl_first"]["value"] for name in edited)
    assert adapter == pytest.approx(whole, rel=0.2)

    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    assert measure.measure(refusing.folder, tmp_path / "out", edited, asked) == found
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()} == before
    other = measure.measure(refusing.folder, tmp_path / "out", {"whole": tmp_path / "adapter"}, asked)
    assert other["whole"]["folder"] == str(tmp_path / "adapter")
