"""Run heretic unattended, and keep the edit of every trial it made. `bench/search.py` starts it.

PYTHON bench/heretic_trials.py FOLDER [what the command `heretic` takes]

PYTHON is one with heretic-llm in it. heretic's own program runs as it is; only its questions are answered here: a
search that was interrupted is taken up, and when it is over, each trial in turn is chosen and saved as the adapter that
heretic makes of it, into FOLDER/trials/NNN. What the search took stands in FOLDER/search.json, without the saving.
A trial in which it is killed counts for heretic as one of those asked for: there will be one less.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState


class Answers:
    """What is answered to the questions that heretic asks in the terminal, known by how they begin."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.waiting: list[FrozenTrial] | None = None
        self.saving: Path | None = None
        self.tried = False

    def select(self, question: str, choices: list[Any]) -> Any:
        """A choice's value; None leaves the menu."""
        if question.startswith("How would you like to proceed"):
            return "continue"
        if question.startswith("Which trial"):
            if self.waiting is None:
                offered = [c.value.number for c in choices if isinstance(c.value, FrozenTrial)]
                self.waiting = [t for t in self._searched(offered) if not _saved(self._place(t))]
            if not self.waiting:
                return None
            trial = self.waiting.pop(0)
            self.saving, self.tried = self._place(trial), False
            return trial
        if question.startswith("What do you want to do"):
            assert self.saving is not None
            if _saved(self.saving):
                return None
            if self.tried:
                sys.exit(f"{self.saving}: heretic could not save this trial; what it said is in its log")
            return "Save the model to a local folder"
        sys.exit(f"heretic asks '{question}', which this script does not know; it was written for heretic 1.4.0")

    def path(self, question: str) -> str:
        """Where the trial goes."""
        assert question.startswith("Path to the folder"), question
        assert self.saving is not None
        self.saving.mkdir(parents=True, exist_ok=True)
        self.tried = True
        return str(self.saving)

    def _place(self, trial: FrozenTrial) -> Path:
        return self.folder / "trials" / f"{trial.user_attrs['index']:03d}"

    def _searched(self, offered: list[int]) -> list[FrozenTrial]:
        """All trials that came to an end; notes them, and what they took, in search.json."""
        (journal,) = (self.folder / "checkpoints").glob("*.jsonl")
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal)))
        study = optuna.load_study(study_name="heretic", storage=storage)
        trials = [t for t in study.trials if t.state == TrialState.COMPLETE]
        starts = [datetime.fromtimestamp(float(s)) for s in (self.folder / "starts").read_text().split()]
        first, last = min(t.datetime_start for t in trials), max(t.datetime_complete for t in trials)
        used = resource.getrusage(resource.RUSAGE_SELF)
        found = {
            "version": version("heretic-llm"),
            "settings": json.loads(study.user_attrs["settings"]),
            "sessions": sum(s < last for s in starts),
            "setup_seconds": (first - max(s for s in starts if s < first)).total_seconds(),
            "cpu_seconds": used.ru_utime + used.ru_stime,
            "peak_bytes": 1024 * used.ru_maxrss,
            "trials": [_described(t, t.number in offered) for t in trials],
        }
        if not (self.folder / "search.json").exists():  # a later session only saves trials, and took what that takes
            (self.folder / "search.json").write_text(json.dumps(found, indent=1) + "\n")
        return trials


def _described(trial: FrozenTrial, offered: bool) -> dict[str, Any]:
    """A trial's parameters, its seconds, its own figures, and whether heretic's menu would offer it."""
    seconds = (trial.datetime_complete - trial.datetime_start).total_seconds()
    return {**trial.user_attrs, "seconds": seconds, "offered": offered}


def _saved(folder: Path) -> bool:
    return (folder / "adapter_model.safetensors").is_file()


def main() -> None:
    """Run it, from a folder in which no settings of anyone's lie."""
    folder, arguments = Path(sys.argv[1]), sys.argv[2:]
    with (folder / "starts").open("a") as starts:
        starts.write(f"{time.time()}\n")
    sys.argv = ["heretic", *arguments]
    import heretic.main

    answers = Answers(folder)
    heretic.main.prompt_select = answers.select
    heretic.main.prompt_path = answers.path
    heretic.main.main()


if __name__ == "__main__":
    main()
