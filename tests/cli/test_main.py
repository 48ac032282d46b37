"""The command line: what it answers, what it prints where, how it fails."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import abliterate.pipeline
from abliterate import inspection
from abliterate.cli import console
from abliterate.cli.main import main
from abliterate.errors import AbliterateError
from tests.conftest import Refusing
from tests.schemas import valid

HELP = [[], ["run"], ["collect"], ["select"], ["edit"], ["eval"], ["resist"], ["report"]]


def call(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The program in a process of its own, as `python -m abliterate`."""
    return subprocess.run(
        [sys.executable, "-m", "abliterate", *args],
        capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80", **env},
    )  # fmt: skip


def run_here(*args: str) -> int:
    """The exit code of the program run in this process."""
    with pytest.raises(SystemExit) as ended:
        main(list(args))
    return int(ended.value.code or 0)


def help_in_a_clean_process(before: str = "") -> subprocess.CompletedProcess[str]:
    """`--help` of each verb, NUL behind it, behind a line of Python, in a process that fails at something heavy."""
    code = (
        f"{before}\nimport sys\nfrom abliterate.cli.main import main\n"
        f"for verb in {HELP!r}:\n"
        "    try: main([*verb, '--help'])\n"
        "    except SystemExit as e: assert not e.code\n"
        "    heavy = {'torch', 'transformers', 'numpy', 'safetensors', 'huggingface_hub'} & set(sys.modules)\n"
        "    assert not heavy, (verb, heavy)\n"
        "    print(end='\\0')"
    )
    env = {**os.environ, "COLUMNS": "80"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)


def test_help_loads_nothing_heavy_shows_examples_and_every_line_fits_80_columns() -> None:
    done = help_in_a_clean_process()
    assert done.returncode == 0, done.stderr
    *texts, behind = done.stdout.split("\0")
    assert behind == ""
    for verb, text in zip(HELP, texts, strict=True):
        assert "Usage" in text
        assert "abliterate" in text.split("Examples" if verb else "Example")[-1]
        assert max(map(len, text.splitlines())) <= 80


def test_help_behind_heavy_imports_is_noticed() -> None:
    assert "AssertionError: ([], {" in help_in_a_clean_process("import abliterate.at_rest").stderr


def test_version() -> None:
    from importlib.metadata import version

    assert call("--version").stdout == f"abliterate {version('abliterate')}\n"


def test_model_and_output_options_without_a_verb_run_everything(refusing: Refusing, tmp_path: Path) -> None:
    done = call("--model", str(refusing.folder), "--output", str(tmp_path / "out"), *refusing.arguments)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "abliteration" / "run.json").is_file()
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert "charts in it, in abliteration/report.html" in " ".join(done.stdout.split())
    assert any(line.split()[:2] == ["refusals", "100.0%"] and "0.0%" in line.split()[4] for line in lines), done.stdout
    assert done.stderr == ""


def test_json_goes_to_standard_output_alone(
    refusing: Refusing, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_here("run", str(refusing.folder), "-o", str(tmp_path / "out"), *refusing.arguments, "--json") == 0
    said = capfd.readouterr()
    record = valid(said.out, "run")
    assert record == json.loads((tmp_path / "out" / "abliteration" / "run.json").read_text())
    assert record["given"]["layer"] == 2 and said.err == ""


def test_the_verbs_one_by_one_give_the_bytes_of_run(
    refusing: Refusing, finished: tuple[object, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, where = str(refusing.folder), refusing.arguments
    prompts = where[: where.index("--layer")]
    acts, direction, out = (str(tmp_path / name) for name in ("acts", "direction.safetensors", "out"))
    assert run_here("collect", model, "-o", acts, *prompts, "--dtype", "float32") == 0
    assert (
        run_here("select", model, acts, "-o", direction, "--layer", "2", "--position", "-1", "--dtype", "float32") == 0
    )
    assert run_here("edit", model, "--direction", direction, "-o", out) == 0
    for shard in Path(out).glob("model-*.safetensors"):
        assert shard.read_bytes() == (finished[1] / shard.name).read_bytes()
    capsys.readouterr()
    assert run_here("eval", out, "--base", model, *prompts, "--dtype", "float32", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    record = json.loads((finished[1] / "abliteration" / "run.json").read_text())
    assert found["metrics"] == record["metrics"]
    assert run_here("eval", model, *prompts) == 0
    table = capsys.readouterr().out
    assert "false refusals" in table and "KL, first" not in table


def test_verbs_refuse_what_does_not_belong_together(
    refusing: Refusing, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, where = str(refusing.folder), refusing.arguments
    acts = str(tmp_path / "acts")
    assert run_here("collect", model, "-o", acts, *where[: where.index("--layer")]) == 0
    assert run_here("collect", model, "-o", acts, *where[: where.index("--layer")]) == 2
    other = tmp_path / "other"
    shutil.copytree(refusing.folder, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    assert run_here("select", str(other), acts, "-o", str(tmp_path / "d.safetensors")) == 2
    assert "another model" in capsys.readouterr().err
    assert run_here("select", model, str(tmp_path), "-o", str(tmp_path / "d.safetensors")) == 3
    assert "collect" in capsys.readouterr().err
    assert (
        run_here("edit", model, "-d", str(tmp_path / "acts" / "harmful.safetensors"), "-o", str(tmp_path / "out")) == 3
    )
    assert "a direction" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["acts", "other"]


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["run", "no-such-folder", "-o", "OUT"], 3, ["no-such-folder", "no such folder"]),
        (["run", "EMPTY", "-o", "OUT"], 3, ["config.json"]),
        (["run", "MODEL", "-o", "OUT", "--harmful", "missing.txt"], 5, ["missing.txt", "no such file"]),
        (["run", "MODEL", "-o", "OUT", "--harmful", "EMPTY.txt"], 5, ["no prompts"]),
        (["run", "MODEL", "-o", "EMPTY"], 2, ["exists"]),
        (["run", "MODEL", "-o", "OUT", "--strength", "7"], 2, ["--strength 7"]),
        (["run", "-o", "OUT"], 2, ["MODEL"]),
        (["run", "MODEL"], 2, ["-o"]),
        (["run", "MODEL", "-o", "OUT", "--layer", "two"], 2, ["--layer"]),
        (["fly"], 2, ["fly"]),
        (["eval", "EMPTY"], 3, ["config.json"]),
    ],
)  # fmt: skip
def test_mistakes_end_in_one_message_and_a_code_by_kind(
    args: list[str], code: int, words: list[str], refusing: Refusing, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "EMPTY.txt").write_text("\n")
    places = {"MODEL": str(refusing.folder)} | {n: str(tmp_path / n) for n in ("EMPTY", "EMPTY.txt", "OUT")}
    assert run_here(*(places.get(a, a) for a in args)) == code
    said = capsys.readouterr()
    assert said.out == "" and all(word in said.err for word in words), said
    assert not (tmp_path / "OUT").exists() and not (tmp_path / "OUT.partial").exists()


def test_a_missing_model_is_told_in_one_line_before_torch_is_imported() -> None:
    lines = [
        ["run", "no-such-folder", "-o", "out"], ["--model", "no-such-folder", "-o", "out"], ["eval", "no-such-folder"],
        ["eval", "demo", "--base", "no-such-folder"], ["undo", "no-such-folder", "-o", "out"],
        ["bench", "demo", "--base", "no-such-folder", "-o", "out"], ["resist", "no-such-folder"],
    ]  # fmt: skip
    code = (
        "import sys\nfrom abliterate.cli.main import main\n"
        f"for line in {lines!r}:\n"
        "    try: main(line)\n"
        "    except SystemExit as e: assert e.code == 3, (line, e.code)\n"
        "    assert 'torch' not in sys.modules, line\n"
    )
    env = {**os.environ, "COLUMNS": "80"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0 and done.stdout == "", done.stderr
    told = done.stderr.splitlines()
    assert len(told) == len(lines) and all(t.startswith("error: no-such-folder: no such folder") for t in told), told


def test_a_log_tells_the_steps_of_what_takes_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for patience, told in ((0.0, ["0 s: reading answers"]), (console.PATIENCE, [])):
        monkeypatch.setattr(console, "PATIENCE", patience)
        with console.progress_bars() as steps:
            steps("reading answers", 2)(2)
        said = capsys.readouterr()
        assert said.err.splitlines() == told and said.out == ""


def test_exit_codes_differ_by_kind() -> None:
    kinds = AbliterateError.__subclasses__()
    codes = [kind.exit_code for kind in kinds]
    assert len(kinds) >= 8 and len(set(codes)) == len(codes) and AbliterateError.exit_code not in codes


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*_a: object, **_k: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(abliterate.pipeline, "run", broken)
    with pytest.raises(ZeroDivisionError):
        main(["run", "demo", "-o", str(tmp_path / "out")])


def test_an_interrupt_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_a: object, **_k: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(abliterate.pipeline, "run", interrupted)
    assert run_here("run", "demo", "-o", str(tmp_path / "out")) == 130
    assert "--resume" in capsys.readouterr().err


def test_inspect_says_what_edit_would_do_and_reads_no_weight(
    refusing: Refusing, finished: tuple[object, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here("inspect", str(refusing.folder), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [(w["role"], w["tensors"]) for w in found["writers"]] == [("embed", 1), ("MLP out", 4), ("attention out", 4)]
    assert found["untouched"] == found["tensors"] - 9 and found["disk"] > found["nbytes"] and found["seconds"] > 0
    assert not inspection.inspect(str(refusing.folder)).edited
    assert inspection.inspect(str(finished[1])).edited
    assert run_here("inspect", str(refusing.folder), "--embeddings", "keep") == 0
    said = capsys.readouterr().out
    assert "MLP out" in said and "kept model.embed_tokens.weight" in said and max(map(len, said.splitlines())) <= 80
    model = tmp_path / "model"
    shutil.copytree(refusing.folder, model)
    for shard in model.glob("*.safetensors"):  # headers stay, every weight becomes NaN
        raw = bytearray(shard.read_bytes())
        start = 8 + int.from_bytes(raw[:8], "little")
        raw[start:] = b"\xff" * (len(raw) - start)
        shard.write_bytes(raw)
    assert run_here("inspect", str(model)) == 0
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    capsys.readouterr()
    assert run_here("inspect", str(model)) == 4
    assert "no edit can be exact" in capsys.readouterr().err


def test_undo_by_command_line_restores_the_base(
    refusing: Refusing, finished: tuple[object, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here("undo", str(finished[1]), "-o", str(tmp_path / "base")) == 0
    assert "9 edited tensors restored" in " ".join(capsys.readouterr().out.split())
    for file in (p for p in refusing.folder.rglob("*") if p.is_file()):
        assert file.read_bytes() == (tmp_path / "base" / file.relative_to(refusing.folder)).read_bytes()
    assert run_here("undo", str(refusing.folder), "-o", str(tmp_path / "no")) == 3
    assert "undo.json" in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_run_writes_an_adapter_that_does_what_the_checkpoint_does(
    refusing: Refusing, finished: tuple[object, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "adapter"
    assert (
        run_here("run", str(refusing.folder), "-o", str(out), *refusing.arguments, "--format", "adapter", "--json") == 0
    )
    record = valid(capsys.readouterr().out, "run")
    whole = json.loads((finished[1] / "abliteration" / "run.json").read_text())
    for ours, theirs in zip(record["metrics"], whole["metrics"], strict=True):
        assert ours["name"] == theirs["name"]
        assert ours["edited"] == pytest.approx(theirs["edited"], rel=0.02, abs=0.05)
    assert {p.name for p in out.iterdir()} == {
        "README.md", "abliteration", "adapter_config.json", "adapter_model.safetensors"
    }  # fmt: skip
