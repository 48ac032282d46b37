"""The command line that repeats a run. Knows the options and what was given, never what came of it."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from typing import Any

from abliterate.options import Options

#: Switches on the command line, by option and value.
_SWITCHES = {
    ("keep_norms", True): "--keep-norms",
    ("force", True): "--force",
    ("undo", False): "--no-undo",
    ("generate", False): "--no-generate",
    ("evaluate", False): "--no-eval",
    ("tune", False): "--no-tune",
    ("tune", True): "--tune",
}


def command(given: dict[str, Any]) -> str:
    """`abliterate run` or `edit` with what was given, defaults left out."""
    words = ["abliterate", "edit" if "direction" in given else "run", str(given.get("model", "MODEL"))]
    if "direction" in given:
        words += ["--direction", str(given["direction"])]
    words += ["-o", str(given.get("output", "OUT"))]
    for name, default in asdict(Options()).items():
        value = given.get(name, default)
        if value is None or value == default:
            continue
        words += [_SWITCHES[name, value]] if (name, value) in _SWITCHES else [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)
