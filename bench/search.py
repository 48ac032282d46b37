"""Strengths by gradient beside heretic's search: time, refusals and KL of both, on prompts that neither saw.

uv run python bench/search.py MODEL WORK [--heretic PYTHON] [--trials 20] [--ours OPTIONS ...] [--stage STAGE] [...]

MODEL is a folder. Both sides get harmful_train and harmless_train of ../shared/data. `abliterate run` splits them;
heretic gets as many as it takes by default, the last 100 of each file to judge trials by and the first 400 others to
find directions (151 harmful ones: there are no more). Stages, all in turn by default, each taken up where it was left:

    heretic   its search, and each trial's edit as the adapter heretic saves
    ours      `abliterate run MODEL`, once for each --ours OPTIONS (the first, by default none, is what is compared)
    measure   every trial and result by `bench/measure.py`: one judge and one KL, on harmful_val, harmless_val, XSTest
    table     WORK/search.json, search.md for docs/benchmarks.md, search.svg

The first two are timed: run them with nothing else on the machine (the load before each stands in the table). `heretic`
needs a Python with heretic-llm in it; without --heretic one is made in WORK.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench import front, measure

#: Prompts heretic takes by default to find directions, and to judge its trials.
DIRECTIONS, EVALUATED = 400, 100
STAGES = ("heretic", "ours", "measure", "table")


def peer(work: Path) -> str:
    """A Python with heretic in it, made where it is not there."""
    home = work / "heretic-llm"
    if not home.exists():
        subprocess.run(["uv", "venv", "-q", str(home)], check=True)
        subprocess.run(["uv", "pip", "install", "-q", "--python", str(home / "bin/python"), "heretic-llm"], check=True)
    return str(home / "bin/python")


def run_logged(command: list[str], folder: Path, log: Path) -> dict[str, float]:
    """Run a command to its end: its seconds, CPU seconds and peak of resident memory, and the load before it."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    load, start = os.getloadavg()[0], time.perf_counter()
    with log.open("a") as said:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT
        )
        try:
            _, status, used = os.wait4(process.pid, 0)
        except KeyboardInterrupt:
            process.wait()
            raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if status:
        sys.exit(f"{shlex.join(command)}: exit {process.returncode}; {log} ends with\n{_end(log)}")
    return {
        "seconds": time.perf_counter() - start, "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_bytes": 1024 * used.ru_maxrss, "load": load,
    }  # fmt: skip


def _end(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])


def heretic_prompts(data: Path, folder: Path) -> list[str]:
    """The prompt files of heretic's four sets, as its options."""
    options = []
    for kind, name in (("harmless", "good"), ("harmful", "bad")):
        rows = [json.loads(line)["prompt"] for line in (data / f"{kind}_train.jsonl").read_text().splitlines()]
        held = rows[-EVALUATED:]
        parts = {f"{name}-prompts": rows[:-EVALUATED][:DIRECTIONS], f"{name}-evaluation-prompts": held}
        for part, prompts in parts.items():
            (folder / f"{part}.txt").write_text("".join(f"{' '.join(p.split())}\n" for p in prompts), encoding="utf-8")
            options += [f"--{part}.dataset", f"{part}.txt"]
    return options


def heretic(chosen: argparse.Namespace) -> None:
    """Its search, unless it is done; `search.json` in the folder heretic of WORK says what it took."""
    folder = chosen.work / "heretic"
    (folder / "trials").mkdir(parents=True, exist_ok=True)
    if (folder / "search.json").is_file() and not missing_trials(folder):
        check_trials(folder, chosen.trials)
        return
    script = Path(__file__).resolve().parent / "heretic_trials.py"
    search = [
        "--model", str(chosen.model), "--n-trials", str(chosen.trials), "--seed", "0", "--export-strategy", "adapter",
        *heretic_prompts(chosen.prompts, folder), *shlex.split(chosen.heretic_options),
    ]  # fmt: skip
    load = folder / "load"
    if not load.exists():
        load.write_text(f"{os.getloadavg()[0]}\n")
    run_logged([chosen.heretic or peer(chosen.work), str(script), str(folder), *search], folder, folder / "log")
    check_trials(folder, chosen.trials)


def searched(folder: Path) -> dict[str, Any]:
    """What heretic's search took and found."""
    found: dict[str, Any] = json.loads((folder / "search.json").read_text())
    return found | {"load": float((folder / "load").read_text())}


def missing_trials(folder: Path) -> list[int]:
    """Trials whose edit is not saved yet."""
    trials = [t["index"] for t in searched(folder)["trials"]]
    return [i for i in trials if not (folder / "trials" / f"{i:03d}" / "adapter_model.safetensors").is_file()]


def check_trials(folder: Path, asked: int) -> None:
    """Stop where the search in this folder is not the one that is asked for."""
    held = searched(folder)["settings"]["n_trials"]
    if held != asked:
        sys.exit(f"{folder}: holds a search of {held} trials, not {asked}; give another WORK, or --trials {held}")
    if missing := missing_trials(folder):
        sys.exit(f"{folder}: trials {missing} were not saved; {folder / 'log'} ends with\n{_end(folder / 'log')}")


def ours(chosen: argparse.Namespace) -> None:
    """One run for each of the options asked for; what is done already stays."""
    for i, options in enumerate(chosen.ours):
        out, told = chosen.work / f"ours-{i}", chosen.work / f"ours-{i}.json"
        if told.is_file() and json.loads(told.read_text())["options"] == options:
            continue
        for folder in (out, out.with_name(f"{out.name}.partial")):
            shutil.rmtree(folder, ignore_errors=True)
        sets = [
            part for kind in ("harmful", "harmless")
            for part in (f"--{kind}", str(chosen.prompts / f"{kind}_train.jsonl"))
        ]  # fmt: skip
        command = [sys.executable, "-m", "abliterate", "run", str(chosen.model), "-o", str(out), *sets]
        took = run_logged([*command, *shlex.split(options)], chosen.work, chosen.work / f"ours-{i}.log")
        record = json.loads((out / "abliteration" / "run.json").read_text())
        told.write_text(json.dumps({"options": options, "steps": record["seconds"], **took}, indent=1) + "\n")


def measured(chosen: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The figures of the base, of ours, of what else was named, and of every trial."""
    trials = sorted((chosen.work / "heretic" / "trials").glob("[0-9]*"))
    edited = {f"ours-{i}": chosen.work / f"ours-{i}" for i in range(len(chosen.ours))}
    edited |= {name: Path(folder) for name, _, folder in (given.partition("=") for given in chosen.edited)}
    edited |= {f"heretic-{folder.name}": folder for folder in trials}
    return measure.measure(chosen.model, chosen.work / "measured", edited, measure.settings_of(chosen))


def table(chosen: argparse.Namespace) -> None:
    """Everything in one file, the table, and the picture."""
    runs = {f"ours-{i}": json.loads((chosen.work / f"ours-{i}.json").read_text()) for i in range(len(chosen.ours))}
    found = {
        "model": str(chosen.model), "threads": os.environ.get("OMP_NUM_THREADS"), "cores": os.cpu_count(),
        "heretic": searched(chosen.work / "heretic"), "ours": runs, "measured": measured(chosen),
    }  # fmt: skip
    trials = {name: f for name, f in found["measured"].items() if name.startswith("heretic")}
    first = found["measured"]["ours-0"]
    found["times"], found["ahead"] = front.times(found["heretic"]), front.ahead(first, trials)
    found["goals"] = front.goals(first, runs["ours-0"], found["heretic"], trials)
    text = front.markdown(found)
    for name, content in (
        ("json", json.dumps(found, indent=1)),
        ("md", text),
        ("svg", front.picture(found["measured"])),
    ):
        (chosen.work / f"search.{name}").write_text(content, encoding="utf-8")
    print(text)


def main() -> None:
    """Run the stages."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--heretic", help="a Python with heretic-llm")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--heretic-options", default="", help="more of heretic's own, in one string")
    parser.add_argument("--ours", action="append", help="options of a run of ours, in one string; may be repeated")
    parser.add_argument("--edited", action="append", default=[], metavar="NAME=FOLDER", help="measure this one as well")
    parser.add_argument("--prompts", type=Path, default=measure.DATA, help="folder of the two train files")
    parser.add_argument("--stage", choices=STAGES)
    measure.add_options(parser)
    chosen = parser.parse_args()
    chosen.ours = chosen.ours or [""]
    chosen.model, chosen.work = chosen.model.expanduser().resolve(), chosen.work.resolve()
    chosen.work.mkdir(parents=True, exist_ok=True)
    stages = {"heretic": heretic, "ours": ours, "measure": measured, "table": table}
    for name in [chosen.stage] if chosen.stage else STAGES:
        stages[name](chosen)


if __name__ == "__main__":
    main()
