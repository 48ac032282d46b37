"""Results as JSON: every verb prints one object that its schema describes, and nothing else."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from abliterate import inspection
from abliterate.envelope import json_text
from abliterate.report.record import RunRecord
from tests.cli.test_main import run_here
from tests.conftest import Refusing
from tests.schemas import FOLDER, SCHEMAS, problems, strict, valid

#: Fits none of our fields.
ODD = {"surprise": {"at": [{}]}}
#: Of one kind each but `edit`, a run, and `alone`, an evaluation; `tests/benchmark` has benchmarks.
PRINTED = (
    "run", "edit", "activations", "direction", "evaluation", "alone", "inspection", "restored", "comparison", "page",
    "card", "resistance", "exported",
)  # fmt: skip


@pytest.fixture(scope="module")
def printed(
    refusing: Refusing, finished: tuple[RunRecord, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """What each verb prints with `--json`; of `run` what it writes, which the tests of the command line compare."""
    root, model, out = tmp_path_factory.mktemp("printed"), str(refusing.folder), str(finished[1])
    options = refusing.arguments
    prompts, exact = options[: options.index("--layer")], ["--dtype", "float32"]
    acts, direction, edited = (str(root / name) for name in ("acts", "direction.safetensors", "edited"))
    verbs = {
        "activations": ["collect", model, "-o", acts, *prompts, *exact],
        "direction": ["select", model, acts, "-o", direction, "--max-kl", "20", *exact],
        "edit": ["edit", model, "--direction", direction, "-o", edited],
        "evaluation": ["eval", edited, "--base", model, *prompts, *exact],
        "alone": ["eval", edited, *prompts, *exact],
        "inspection": ["inspect", model],
        "resistance": ["resist", model, "--directions", "1", *prompts, *exact],
        "restored": ["undo", out, "-o", str(root / "base")],
        "comparison": ["compare", model, out, "--direction", f"{out}/abliteration/directions.safetensors"],
        "page": ["report", out],
        "exported": ["export", out, "-o", str(root / "vector.gguf")],
        "card": ["report", out, "--md", "-o", str(root / "card.md")],
    }
    texts = {"run": (finished[1] / "abliteration" / "run.json").read_text(encoding="utf-8")}
    for kind, words in verbs.items():
        with contextlib.redirect_stdout(io.StringIO()) as stdout:
            assert run_here(*words, "--json") == 0
        texts[kind] = stdout.getvalue()
    texts["observed"] = (root / "acts" / "observed.json").read_text(encoding="utf-8")
    return texts


@pytest.mark.parametrize("name", [*PRINTED, "observed"])
def test_every_verb_prints_one_object_that_its_schema_describes(name: str, printed: dict[str, str]) -> None:
    found = valid(printed[name], {"edit": "run", "alone": "evaluation"}.get(name, name))
    assert found["tool"] == "abliterate" and isinstance(found["schema"], int)
    assert name in ("run", "observed") or printed[name].isascii()


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key below a value; of lists the first item."""
    keys = list(value) if isinstance(value, dict) else range(min(1, len(value)))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


def shortened(value: Any) -> Any:
    """The same with one item left of every list, so that it is quickly looked through."""
    if isinstance(value, dict):
        return {name: shortened(item) for name, item in value.items()}
    return [shortened(item) for item in value[:1]] if isinstance(value, list) else value


@pytest.mark.parametrize("name", [*PRINTED, "observed"])
def test_what_is_not_described_is_noticed(name: str, printed: dict[str, str]) -> None:
    """The control of the test above: a field more, a field less, a value of another type."""
    value = shortened(strict(printed[name]))
    kind = value["kind"]
    assert not problems(value, kind)
    for field in value:
        assert problems({k: v for k, v in value.items() if k != field}, kind), f"{name} without {field}"
    for place, key in list(places(value)):
        kept = place[key]
        place[key] = ODD
        assert problems(value, kind), f"{name}: {key} of another type"
        place[key] = kept
        if isinstance(kept, dict):
            place[key] = kept | ODD
            assert problems(value, kind), f"{name}: a field more in {key}"
            place[key] = kept
    assert problems(value | ODD, kind) and problems(value | {"schema": 99}, kind) and not problems(value, kind)


def described(schema: Any, path: str) -> Iterator[str]:
    """Properties without a description, at them or at what they refer to."""
    if isinstance(schema, list):
        for i, item in enumerate(schema):
            yield from described(item, f"{path}/{i}")
    elif isinstance(schema, dict):
        for name, item in schema.get("properties", {}).items():
            if not told(item, path.split("#")[0]):
                yield f"{path}/{name}"
        for name, item in schema.items():
            yield from described(item, f"{path}/{name}")


def told(schema: dict[str, Any], file: str) -> bool:
    if schema.get("description") or "$ref" not in schema:
        return bool(schema.get("description"))
    place, _, pointer = schema["$ref"].partition("#")
    found: Any = SCHEMAS[place or file]
    for part in pointer.strip("/").split("/"):
        found = found[part]
    return told(found, place or file)


@pytest.mark.parametrize("file", sorted(SCHEMAS))
def test_schemas_are_schemas_and_describe_every_field(file: str) -> None:
    schema = SCHEMAS[file]
    Draft202012Validator.check_schema(schema)
    assert f"{schema['properties']['kind']['const']}.json" == file
    assert [*schema["properties"]][:3] == ["tool", "schema", "kind"]
    assert not list(described(schema, f"{file}#"))
    bare = copy.deepcopy(schema)
    del bare["properties"]["tool"]["description"]
    assert list(described(bare, f"{file}#")) == [f"{file}#/tool"]


def test_every_schema_is_of_something_that_is_printed_or_written(printed: dict[str, str]) -> None:
    assert {f.stem for f in FOLDER.iterdir()} == {strict(text)["kind"] for text in printed.values()} | {"benchmarks"}


def test_numbers_that_are_not_finite_become_null(finished: tuple[RunRecord, Path], tmp_path: Path) -> None:
    value = {"a": float("nan"), "b": [1.5, float("inf"), (-float("inf"),)], "c": "NaN", "d": 1 / 3}
    assert strict(json_text(value)) == {"a": None, "b": [1.5, None, [None]], "c": "NaN", "d": 1 / 3}
    with pytest.raises(ValueError, match="NaN"):
        strict(json.dumps(value))
    record = copy.deepcopy(finished[0])
    record.metrics[2]["edited"] = float("inf")
    record.charts["kl"]["kl_first_token"][-1] = float("inf")
    out = tmp_path / "out"
    out.mkdir()
    record.save(out / "run.json")
    assert valid((out / "run.json").read_text(encoding="utf-8"), "run")["metrics"][2]["edited"] is None
    assert run_here("report", str(out)) == 0 and (out / "report.html").is_file()


def test_what_libraries_print_does_not_get_into_the_result(
    refusing: Refusing, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inspect = inspection.inspect

    def noisy(*args: Any, **options: Any) -> inspection.Inspection:
        print("advice of a library")
        return inspect(*args, **options)

    monkeypatch.setattr(inspection, "inspect", noisy)
    assert run_here("inspect", str(refusing.folder), "--json") == 0
    said = capsys.readouterr()
    valid(said.out, "inspection")
    assert said.err == "advice of a library\n"


def test_an_error_leaves_standard_output_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in (["inspect"], ["report"], ["eval"], ["compare", str(tmp_path)], ["undo", "-o", str(tmp_path / "o")]):
        assert run_here(*verb, str(tmp_path / "none"), "--json") == 3
        said = capsys.readouterr()
        assert said.out == "" and said.err.startswith("error: ") and len(said.err.splitlines()) == 1


def test_records_without_a_kind_are_read_and_others_are_not(
    finished: tuple[RunRecord, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value = finished[0].as_dict
    (tmp_path / "run.json").write_text(json.dumps({k: v for k, v in value.items() if k != "kind"}))
    assert RunRecord.load(tmp_path / "run.json") == finished[0]
    (tmp_path / "run.json").write_text(json.dumps(value | {"kind": "evaluation"}))
    assert run_here("report", str(tmp_path)) == 3
    assert "of kind evaluation; expected run" in capsys.readouterr().err
