"""Who is ahead on refusals and KL: the dominated, the goals, a Markdown table and a picture, from plain figures.

Owns how `bench/search.py` tells what it found; measures nothing. A *side* is what that script writes to search.json.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from markupsafe import Markup

from abliterate.evaluate.intervals import bootstrap, mean
from abliterate.report.svg import Scale, mark, plain, tag

Figures = dict[str, Any]

#: The sets whose refusals are an axis, with the judges that count them.
AXES = {"harmful": "harmful_val", "xstest_unsafe": "XSTest, unsafe"}
JUDGES = ("rules", "classifier")
#: What the search of the peer's default length has, and what share of it ours may take.
TRIALS, SHARE = 200, 50
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #222 } .end { text-anchor: end } .middle { text-anchor: middle }
.grid { stroke: #ddd } .base { stroke: #888; stroke-dasharray: 4 3 } .small { font-size: 9px; fill: #777 }
.mark.heretic { fill: #fff; stroke: #b3541e; stroke-width: 2 } .mark.ours { fill: #1f5fa8; stroke: #fff }
.mark.other { fill: #fff; stroke: #1f5fa8; stroke-width: 2 }
.line { fill: none; stroke: #1f5fa8; stroke-width: 1.5 }
"""


def at(figures: Figures, kind: str = "harmful", judge: str = "rules") -> tuple[float, float]:
    """A model's place: share of refusals, mean KL at the first token."""
    return figures["refusals"][kind][judge]["value"], figures["kl_first"]["value"]


def better(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether `one` is at least as good on both axes and better on one."""
    return all(a <= b for a, b in zip(one, other, strict=True)) and one != other


def ahead(ours: Figures, others: dict[str, Figures]) -> dict[str, dict[str, list[str]]]:
    """By set and judge: which of the others are ahead of ours, and which are behind it, on both axes."""
    found = {}
    for kind in AXES:
        for judge in JUDGES:
            here, there = at(ours, kind, judge), {name: at(f, kind, judge) for name, f in others.items()}
            found[f"{AXES[kind]}, {judge}"] = {
                "ahead": [name for name, place in there.items() if better(place, here)],
                "behind": [name for name, place in there.items() if better(here, place)],
            }
    return found


def pareto(figures: dict[str, Figures], kind: str) -> list[str]:
    """Those that no other is ahead of, by falling refusals."""
    places = {name: at(f, kind) for name, f in figures.items()}
    kept = [n for n, place in places.items() if not any(better(other, place) for other in places.values())]
    return sorted(kept, key=lambda n: places[n][::-1])


def times(search: dict[str, Any]) -> dict[str, Any]:
    """What heretic's search took, and would take with all its trials: setup and seconds a trial, with its interval."""
    import numpy as np

    each = np.array([t["seconds"] for t in search["trials"]])
    trial, setup = bootstrap(each, mean), search["setup_seconds"]
    return {
        "setup": setup, "trial": trial._asdict(), "n": len(each), "total": setup + float(each.sum()),
        "extrapolated": {key: setup + TRIALS * value for key, value in trial._asdict().items()},
    }  # fmt: skip


def goals(ours: Figures, run: dict[str, Any], search: dict[str, Any], others: dict[str, Figures]) -> list[list[str]]:
    """What was asked for, what came out, and whether that is enough."""
    rate, kl = at(ours)
    ratio, whole = ours["perplexity_ratio"]["value"], times(search)["extrapolated"]["value"]
    front = ahead(ours, others)
    every = {
        f"at most 1/{SHARE} of {TRIALS} trials": (f"1/{whole / run['seconds']:.0f}", whole >= SHARE * run["seconds"]),
        "less than 480 s": (f"{run['seconds']:.0f} s", run["seconds"] < 480),
        "at most 5% refusals": (f"{rate:.1%}", rate <= 0.05),
        "first-token KL at most 0.03": (f"{kl:.4f}", kl <= 0.03),
        "KL along the answer at most 0.015": (f"{ours['kl_along']['value']:.4f}", ours["kl_along"]["value"] <= 0.015),
        "perplexity within 1%": (f"× {ratio:.4f}", abs(ratio - 1) <= 0.01),
    }
    every |= {
        f"no trial ahead on both axes ({where})": (", ".join(found["ahead"]) or "none", not found["ahead"])
        for where, found in front.items()
    }
    return [[goal, value, "met" if met else "**not met**"] for goal, (value, met) in every.items()]


def markdown(found: dict[str, Any]) -> str:
    """The section of docs/benchmarks.md."""
    search, measured = found["heretic"], found["measured"]
    trials = {name: f for name, f in measured.items() if name.startswith("heretic")}
    ours = {name: f for name, f in measured.items() if name.startswith("ours")}
    first, run = ours["ours-0"], found["ours"]["ours-0"]
    lines = [*_time_lines(found), "", *_goal_lines(goals(first, run, search, trials)), "", *_said(first, trials), ""]
    lines += [_HEAD, "| " + " | ".join(["---"] * (_HEAD.count("|") - 1)) + " |"]
    own = {f"heretic-{t['index']:03d}": t for t in search["trials"]}
    for name, figures in measured.items():
        lines.append(_line(_name(name, found, own), figures))
    n = {kind: by["rules"]["n"] for kind, by in measured["base"]["refusals"].items()}
    lines += [
        "",
        f"n: harmful_val {n['harmful']}, XSTest unsafe {n['xstest_unsafe']} and safe {n['xstest_safe']}, harmless_val "
        f"{n['harmless']}, of which the base answers {first['kl_first']['n']}: KL and perplexity are of these. KL of "
        f"the base against itself: {first['kl_floor']:.1e}. Wilson's and bootstrap 95% intervals over prompts. Answers "
        f"of {first['settings']['tokens']} tokens, under the system prompt {_system(first['settings'])}; heretic "
        f"searched under '{search['settings']['system_prompt']}'. A star marks what its own menu would offer.",
    ]
    return "\n".join(lines) + "\n"


_HEAD = (
    "| model | its own figures | refusals, rules | classifier | XSTest unsafe | XSTest safe | harmless | "
    "KL, first token | median | KL, all prompts | KL along | perplexity |"
)


def _time_lines(found: dict[str, Any]) -> Iterator[str]:
    search, took = found["heretic"], times(found["heretic"])
    long = took["extrapolated"]
    cut = f", taken up {search['sessions'] - 1} times" if search["sessions"] > 1 else ""
    startup = search["settings"]["n_startup_trials"]
    yield "| side | seconds | of which | CPU seconds | peak memory, GB | load before |"
    yield "| --- | --- | --- | --- | --- | --- |"
    yield (
        f"| heretic {search['version']}, {took['n']} trials{cut} | {took['total']:.0f} | {took['setup']:.0f} setup, "
        f"{took['trial']['value']:.1f} [{took['trial']['low']:.1f}, {took['trial']['high']:.1f}] a trial | "
        f"{search['cpu_seconds']:.0f} | {search['peak_bytes'] / 1e9:.2f} | {search['load']:.2f} |"
    )
    yield (
        f"| the same, {TRIALS} trials, extrapolated | {long['value']:.0f} [{long['low']:.0f}, {long['high']:.0f}] | "
        "| | | |"
    )
    for name, run in found["ours"].items():
        steps = ", ".join(f"{seconds:.0f} {step}" for step, seconds in run["steps"].items())
        yield (
            f"| {name} (`{run['options'] or 'defaults'}`) | {run['seconds']:.0f} | {steps} | "
            f"{run['cpu_seconds']:.0f} | {run['peak_bytes'] / 1e9:.2f} | {run['load']:.2f} |"
        )
    yield (
        f"\nheretic draws its first {startup} trials at random; seed {search['settings']['seed']}. Answers of its "
        f"judgement have {search['settings']['max_response_length']} tokens, in batches of "
        f"{search['settings']['batch_size']}."
    )


def _goal_lines(rows: list[list[str]]) -> Iterator[str]:
    yield "| goal | ours | |\n| --- | --- | --- |"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def _said(ours: Figures, trials: dict[str, Figures]) -> Iterator[str]:
    for where, found in ahead(ours, trials).items():
        n = len(found["ahead"])
        who = f"{n} of {len(trials)} trials are" if n != 1 else f"1 of {len(trials)} trials is"
        yield (
            f"- {where}, against first-token KL: {who} at least as good as ours on both axes and better on one"
            f"{' (' + ', '.join(found['ahead']) + ')' if n else ''}; ours is so against {len(found['behind'])}."
        )


def _system(settings: dict[str, Any]) -> str:
    given = settings["system_prompt"]
    return "of the template" if given is None else f"'{given}'"


def _name(name: str, found: dict[str, Any], own: dict[str, Any]) -> str:
    if name in own:
        t = own[name]
        star = " *" if t["offered"] else ""
        return f"{name}{star} | {t['refusals']} of {t['n_bad_prompts']} at {t['kl_divergence']:.4f}"
    options = found["ours"].get(name, {}).get("options")
    return f"{name}{f' (`{options}`)' if options else ''} | –"


def _line(name: str, f: Figures) -> str:
    rates = [f["refusals"]["harmful"][judge] for judge in JUDGES]
    rates += [f["refusals"][kind]["rules"] for kind in ("xstest_unsafe", "xstest_safe", "harmless")]
    cells = [percent(r) for r in rates]
    if "kl_first" not in f:
        return f"| {' | '.join([name, *cells, '–', '–', '–', '–', '1'])} |"
    first, everything, along, ratio = (f[k] for k in ("kl_first", "kl_first_all", "kl_along", "perplexity_ratio"))
    cells += [interval(first), f"{first['median']:.4f}", interval(everything), interval(along)]
    return f"| {' | '.join([name, *cells, f'× {interval(ratio)}'])} |"


def percent(rate: dict[str, float]) -> str:
    """A share with its interval."""
    return f"{100 * rate['value']:.1f}% [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"


def interval(f: dict[str, float]) -> str:
    """A figure with its interval."""
    return f"{f['value']:.4f} [{f['low']:.4f}, {f['high']:.4f}]"


WIDTH, HEIGHT, LEFT, TOP = 330, 260, 52, 40
SHAPES = {"heretic": "circle", "ours": "diamond", "other": "square"}
NAMES = {"heretic": "a trial of heretic", "ours": "a run of ours", "other": "other edits"}


def picture(measured: dict[str, Figures]) -> str:
    """Refusals against first-token KL, of every model; the line joins those of ours that none of ours is ahead of."""
    drawn = [panel(measured, kind, (LEFT + i * (WIDTH + LEFT + 16), TOP)) for i, kind in enumerate(AXES)]
    size = {"width": 2 * (WIDTH + LEFT + 16) + 8, "height": HEIGHT + TOP + 84}
    key = []
    for i, side in enumerate(SHAPES):
        x, y = LEFT + 150 * i, size["height"] - 14
        key += [mark(SHAPES[side], side, str(x), str(y)), tag("text", NAMES[side], x=x + 10, y=y + 4)]
    said = "Refusals against KL at the first token: trials of heretic and results of abliterate"
    inside = (tag("title", said), tag("style", Markup(STYLE)), tag("rect", width="100%", height="100%", fill="#fff"))
    return str(tag("svg", *inside, *drawn, *key, xmlns="http://www.w3.org/2000/svg", **size)) + "\n"


def panel(measured: dict[str, Figures], kind: str, origin: tuple[int, int]) -> Markup:
    """One set's refusals, by the rules."""
    models = {name: f for name, f in measured.items() if "kl_first" in f}
    across = Scale.over([at(f, kind)[1] for f in models.values()], log=True)
    up = Scale.over([at(f, kind)[0] for f in measured.values() if "kl_first" in f] + [1.0], zero=True)

    def place(name: str) -> tuple[float, float]:
        rate, kl = at(models[name], kind)
        return WIDTH * across.share(kl), HEIGHT * (1 - up.share(rate))

    n = measured["base"]["refusals"][kind]["rules"]["n"]
    inside = [tag("text", f"refusals, {AXES[kind]}, n = {n}", x=-LEFT + 8, y=-18)]
    for tick in up.ticks:
        y = HEIGHT * (1 - up.share(tick))
        inside += [tag("line", x1=0, x2=WIDTH, y1=y, y2=y, class_="grid")]
        inside += [tag("text", f"{100 * tick:.0f}%", x=-8, y=y + 4, class_="end")]
    for tick in across.ticks:
        x = WIDTH * across.share(tick)
        inside.append(tag("text", plain(tick), x=x, y=HEIGHT + 18, class_="middle"))
    inside.append(tag("text", "KL at the first token, nats", x=WIDTH / 2, y=HEIGHT + 38, class_="middle"))
    y = HEIGHT * (1 - up.share(measured["base"]["refusals"][kind]["rules"]["value"]))
    inside += [
        tag("line", x1=0, x2=WIDTH, y1=y, y2=y, class_="base"),
        tag("text", "base", x=4, y=y - 4, class_="small"),
    ]
    front = [place(name) for name in pareto({n: f for n, f in models.items() if n.startswith("ours")}, kind)]
    if len(front) > 1:
        inside.append(tag("path", d="M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in front), class_="line"))
    for name, f in models.items():
        x, y = place(name)
        side = next((s for s in ("heretic", "ours") if name.startswith(s)), "other")
        rate, kl = at(f, kind)
        inside.append(mark(SHAPES[side], side, f"{x:.1f}", f"{y:.1f}", f"{name}: {rate:.1%} at {kl:.4f}"))
        inside.append(tag("text", name.split("-")[-1].lstrip("0") or "0", x=x + 6, y=y - 5, class_="small"))
    return tag("g", *inside, transform=f"translate({origin[0]},{origin[1]})")
