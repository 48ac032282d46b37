"""GGUF files are edited, published, taken back and compared: what is asked for changes, and not a byte else."""

from __future__ import annotations

import json
import os
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import quants

from abliterate import at_rest, inspection, results, workspace
from abliterate.checkpoint.ggml_blocks import LAYOUTS
from abliterate.checkpoint.gguf_file import read_gguf
from abliterate.cli.main import main
from abliterate.direction.given import load_given
from abliterate.edit import apply
from abliterate.errors import CheckpointError, UnsupportedError, UsageError, VerifyError
from abliterate.export import export
from abliterate.report.record import RunRecord
from tests import gguf_files as g

R = np.random.default_rng(5).normal(size=g.WIDE)
R /= np.linalg.norm(R)
TYPES = [*LAYOUTS, "F16", "F32"]
ADDED = {f"abliterate.{name}" for name in ("version", "base", "directions", "edit")}


class Stop(BaseException):
    """A process that is killed."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the files below lie, with a direction; no test writes to them."""
    path = tmp_path_factory.mktemp("gguf")
    np.save(path / "r.npy", R)
    return path


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """A file whose writers are of all types that can be edited."""
    return g.of_block_types(folder / "whole.gguf", TYPES)


@pytest.fixture(scope="module")
def split(folder: Path) -> Path:
    """A small one in parts."""
    return g.of_block_types(folder / "parts.gguf", ["Q4_K", "Q6_K", "Q8_0"], split=5)


@pytest.fixture(scope="module")
def edited(folder: Path, whole: Path) -> Path:
    """The first one edited."""
    return edit(whole, folder / "edited.gguf")


@pytest.fixture
def copy(edited: Path, tmp_path: Path) -> Path:
    """The result, and its records, which a test may damage."""
    shutil.copytree(edited.with_name("edited.abliteration"), tmp_path / "copy.abliteration")
    return Path(shutil.copy(edited, tmp_path / "copy.gguf"))


def edit(source: Path, out: Path, **options: Any) -> Path:
    at_rest.edit(str(source), source.with_name("r.npy"), out, **options)
    return out


def hashes(folder: Path, pattern: str) -> dict[str, str]:
    files = (f for p in folder.glob(pattern) for f in ([p] if p.is_file() else p.rglob("*")) if f.is_file())
    return {str(f.relative_to(folder)): sha256(f.read_bytes()).hexdigest() for f in files}


def stored(path: Path) -> dict[str, tuple[str, bytes, Any]]:
    """Type, bytes and numbers of every tensor, as llama.cpp's own package reads them."""
    return {
        t.name: (t.tensor_type.name, t.data.tobytes(), quants.dequantize(t.data, t.tensor_type))
        for t in gguf.GGUFReader(path).tensors
    }


def along(name: str, values: Any) -> float:
    """The share of a tensor along the direction."""
    return float(np.linalg.norm(values @ R if "embd" in name else R @ values) / np.linalg.norm(values))


def test_every_type_loses_the_direction_and_nothing_else_changes(whole: Path, edited: Path) -> None:
    before, after = stored(whole), stored(edited)
    assert list(before) == list(after)
    writers = {n for n in before if n.startswith("token_embd") or "_output" in n or "_down" in n}
    assert {before[n][0] for n in writers} == set(TYPES)
    for name, (dtype, raw, values) in before.items():
        assert after[name][0] == dtype
        if name not in writers:
            assert after[name][1] == raw
        else:
            assert along(name, values) > 0.03 and along(name, after[name][2]) < 2e-4
    record = RunRecord.load(edited.with_name("edited.abliteration") / "run.json")
    assert {e["tensor"] for e in record.edits} == writers and max(e["leak"] for e in record.edits) < 0.003
    assert record.base_card == {"license": "apache-2.0"} and record.model_fingerprint in edited.read_bytes().decode(
        "latin1"
    )
    old, new = read_gguf(whole), read_gguf(edited)
    assert new.metadata.keys() - old.metadata.keys() == ADDED and new.alignment == 64
    bytes_old, bytes_new = whole.read_bytes(), edited.read_bytes()
    assert all(bytes_old[slice(*old.spans[k])] == bytes_new[slice(*new.spans[k])] for k in old.spans)


@pytest.mark.parametrize("which", ["whole", "split"])
@pytest.mark.parametrize("options", [{}, {"strength": 0.5, "embeddings": "keep"}, {"keep_norms": True}], ids=str)
def test_the_base_comes_back_bit_for_bit(
    which: str, options: dict[str, Any], folder: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source: Path = request.getfixturevalue(which)
    parts = len(list(folder.glob(f"{which if which == 'whole' else 'parts'}*.gguf")))
    edit(source, tmp_path / "out.gguf", **options)
    made = sorted(p.name for p in tmp_path.glob("*"))
    first = "out.gguf" if parts == 1 else f"out-00001-of-{parts:05d}.gguf"
    assert len(made) == parts + 1 and made[:1] == ([first] if parts > 1 else ["out.abliteration"])
    # Whatever it is called by now.
    for path in list(tmp_path.iterdir()):
        path.rename(path.with_name(path.name.replace("out", "named")))
    restored = at_rest.undo(str(tmp_path / first.replace("out", "named")), tmp_path / "base.gguf")
    assert restored.files == parts
    was = sorted(hashes(folder, "whole.gguf" if which == "whole" else "parts*.gguf").values())
    assert sorted(hashes(tmp_path, "base*").values()) == was
    assert not set(was) <= set(hashes(tmp_path, "named*").values())


def test_an_edit_of_an_edit_is_taken_back_once_and_twice(
    folder: Path, edited: Path, whole: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "s.npy", np.roll(R, 1))
    at_rest.edit(str(edited), tmp_path / "s.npy", tmp_path / "second.gguf")
    assert read_gguf(tmp_path / "second.gguf").metadata.keys() == read_gguf(edited).metadata.keys()
    at_rest.undo(str(tmp_path / "second.gguf"), tmp_path / "first.gguf")
    assert (tmp_path / "first.gguf").read_bytes() == edited.read_bytes()
    assert list(hashes(tmp_path / "first.abliteration", "*").values()) == list(
        hashes(folder / "edited.abliteration", "*").values()
    )
    at_rest.undo(str(tmp_path / "first.gguf"), tmp_path / "base.gguf")
    assert (tmp_path / "base.gguf").read_bytes() == whole.read_bytes()
    assert not (tmp_path / "base.abliteration").exists()


@pytest.fixture(scope="module")
def calm(split: Path, folder: Path) -> dict[str, str]:
    """What an undisturbed edit of the parts gives, but for files with times in them."""
    edit(split, folder / "calm" / "out.gguf")
    return lasting(folder / "calm")


def lasting(folder: Path) -> dict[str, str]:
    again = {f"out.abliteration/{name}" for name in ("run.json", "report.html", "README.md")}
    return {name: digest for name, digest in hashes(folder, "out*").items() if name not in again}


@pytest.mark.parametrize("at", range(8))
def test_an_edit_that_is_killed_while_it_publishes_goes_on(
    at: int, split: Path, calm: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, publish = iter(range(99)), workspace.move_out

    def killed(call: Any) -> Any:
        def inner(*args: Any, **options: Any) -> Any:
            if next(count) == at:
                raise Stop
            return call(*args, **options)

        return inner

    with monkeypatch.context() as patch:

        def armed(*args: Any) -> None:
            for where, name in ((os, "link"), (Path, "unlink"), (Path, "rename"), (shutil, "rmtree")):
                patch.setattr(where, name, killed(getattr(where, name)))
            publish(*args)

        patch.setattr(workspace, "move_out", armed)
        with pytest.raises(Stop):
            edit(split, tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf.partial").is_dir()
    edit(split, tmp_path / "out.gguf", resume=True)
    assert lasting(tmp_path) == calm and not (tmp_path / "out.gguf.partial").exists()


def test_an_edit_that_is_killed_between_two_parts_writes_the_first_no_more(
    split: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, begun = apply.ShardEdit, list[str]()

    def counted(source: Path, *rest: Any) -> Any:
        begun.append(source.name)
        if len(begun) == 3:
            raise Stop
        return begin(source, *rest)

    monkeypatch.setattr(apply, "ShardEdit", counted)
    with pytest.raises(Stop):
        edit(split, tmp_path / "out.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf.partial"]
    with pytest.raises(UsageError, match="--resume"):
        edit(split, tmp_path / "out.gguf")
    edit(split, tmp_path / "out.gguf", resume=True)
    assert begun[3:][0] == begun[1]
    at_rest.undo(str(next(tmp_path.glob("out-00001*"))), tmp_path / "base.gguf")
    assert sorted(hashes(tmp_path, "base*").values()) == sorted(hashes(folder, "parts*").values())


def test_names_that_are_taken_are_left_alone(whole: Path, split: Path, folder: Path, tmp_path: Path) -> None:
    for taken in ("a.gguf", "b.abliteration", "c-00002-of-00003.gguf"):
        (tmp_path / taken).write_text("mine")
        source, out = (split, "c.gguf") if taken[0] == "c" else (whole, f"{taken[0]}.gguf")
        with pytest.raises(UsageError, match=rf"{taken}: exists already"):
            edit(source, tmp_path / out)
        assert (tmp_path / taken).read_text() == "mine"
    assert {p.name for p in tmp_path.iterdir()} == {"a.gguf", "b.abliteration", "c-00002-of-00003.gguf"}


def test_a_name_that_is_taken_meanwhile_is_left_alone(
    split: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish, taken = at_rest.finish, tmp_path / "out-00001-of-00003.gguf"

    def appears(*arguments: Any) -> None:
        taken.write_text("mine")
        finish(*arguments)

    monkeypatch.setattr(at_rest, "finish", appears)
    with pytest.raises(UsageError, match="appeared while the run lasted"):
        edit(split, tmp_path / "out.gguf")
    assert taken.read_text() == "mine" and {p.name for p in tmp_path.iterdir()} == {taken.name, "out.gguf.partial"}
    monkeypatch.undo()
    taken.unlink()
    edit(split, tmp_path / "out.gguf", resume=True)
    assert taken.is_file()


@pytest.mark.parametrize(("options", "out", "error", "words"), [
    ({}, "out", UsageError, "ends in .gguf"), ({"format": "adapter"}, "o.gguf", UnsupportedError, "--format adapter"),
    ({"embeddings": "untie"}, "o.gguf", UnsupportedError, "--embeddings edit or keep"),
    ({"requantize": "Q9"}, "o.gguf", UsageError, "--requantize Q9: expected one of"),
])  # fmt: skip
def test_what_a_gguf_cannot_be_is_said(
    options: dict[str, Any], out: str, error: type[Exception], words: str, folder: Path, tmp_path: Path
) -> None:
    tied = folder / "tied.gguf"
    if not tied.exists():
        g.of_block_types(tied, ["Q4_0", "F16", "F16"], head=False)
    with pytest.raises(error, match=words):
        edit(tied, tmp_path / out, **options)
    assert not list(tmp_path.iterdir())
    assert "changes with it" in str(inspection.inspect(str(tied)).tied_head)


@pytest.mark.parametrize("target", ["Q4_K", "bf16"])
def test_types_that_cannot_be_edited_get_another_and_come_back(target: str, folder: Path, tmp_path: Path) -> None:
    source = folder / "small.gguf"
    if not source.exists():
        g.of_block_types(source, ["Q4_K", "IQ3_XXS", "IQ2_XS", "IQ3_S", "Q6_K"])
    with pytest.raises(UnsupportedError, match=r"'blk\.0\.\w+\.weight' is stored as IQ\w+.*--requantize Q4_K"):
        edit(source, tmp_path / "out.gguf")
    with pytest.raises(UnsupportedError, match="is larger as IQ3_XXS already"):
        edit(source, tmp_path / "out.gguf", requantize="Q2_K")
    record = at_rest.edit(str(source), folder / "r.npy", tmp_path / "out.gguf", requantize=target)
    before, after = stored(source), stored(tmp_path / "out.gguf")
    assert record.retyped == {n: target.upper() for n, (dtype, *_) in before.items() if dtype.startswith("IQ")} != {}
    for name, (dtype, raw, values) in before.items():
        if name in record.retyped:
            exact = values - np.outer(R, R @ values)
            off = np.linalg.norm(after[name][2] - exact) / np.linalg.norm(exact)
            assert after[name][0] == target.upper() and off < 0.15
        elif name not in {e["tensor"] for e in record.edits}:
            assert after[name][:2] == (dtype, raw)
    assert all(along(e["tensor"], after[e["tensor"]][2]) < 2e-4 < along(e["tensor"], before[e["tensor"]][2])
               for e in record.edits)  # fmt: skip
    at_rest.undo(str(tmp_path / "out.gguf"), tmp_path / "base.gguf")
    assert (tmp_path / "base.gguf").read_bytes() == source.read_bytes()


@pytest.mark.parametrize(("damage", "error", "words"), [
    ("gone", CheckpointError, "there is no copy.abliteration/undo.json beside it"),
    ("other", CheckpointError, "of another file than copy.gguf"), ("note", CheckpointError, "damaged"),
    ("header", CheckpointError, "damaged"), ("size", CheckpointError, "which cannot be"),
    ("sidecar", CheckpointError, "is missing"), ("weights", VerifyError, "was changed since"),
])  # fmt: skip
def test_records_that_do_not_lead_back_are_named(
    damage: str, error: type[Exception], words: str, copy: Path, whole: Path, tmp_path: Path
) -> None:
    from abliterate.edit.undo import note_sha256

    records = copy.with_name("copy.abliteration")
    note = json.loads((records / "undo.json").read_text())
    if damage == "gone":
        shutil.rmtree(records)
    elif damage == "other":
        shutil.copy(whole, copy)
    elif damage == "sidecar":
        (records / "undo" / "00000.undo").unlink()
    elif damage == "weights":
        tensor = read_gguf(copy).tensors["blk.0.ffn_down.weight"]
        raw = bytearray(copy.read_bytes())
        raw[tensor.offset + 40] ^= 255
        copy.write_bytes(raw)
    elif damage == "note":
        (records / "undo.json").write_text(json.dumps(note | {"base": "0"}))
    else:
        header = note["files"][0]["header"]
        if damage == "size":
            header["size"] *= 1000
        else:
            header["pieces"][0] = "AAAA"
        del note["sha256"], note["schema"]
        (records / "undo.json").write_text(json.dumps({"schema": 3, "sha256": note_sha256(note), **note}))
    with pytest.raises(error, match=words):
        at_rest.undo(str(copy), tmp_path / "base.gguf")
    assert not list(tmp_path.glob("base*"))


def test_vectors_of_the_streams_width_are_compared_as_well(whole: Path, copy: Path) -> None:
    """Of two conversions even the norms differ, by what was rounded on the way."""
    norm = read_gguf(copy).tensors["blk.0.attn_norm.weight"]
    with copy.open("r+b") as file:
        file.seek(norm.offset)
        file.write((np.frombuffer(copy.read_bytes(), "<f4", g.WIDE, norm.offset) * np.float32(1.01)).tobytes())
    found = at_rest.compare(str(whole), str(copy))
    changed = {t.tensor: t for t in found.changed}
    assert changed[norm.name].share == pytest.approx(0.01, rel=0.01) and changed[norm.name].role is None
    assert found.directions.shape == (1, g.WIDE) and abs(float(found.directions[0] @ R)) > 0.9


def test_a_split_result_goes_by_the_name_it_was_given_and_is_called_by_its_first_part(
    split: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def cli(*args: str) -> object:
        with pytest.raises(SystemExit) as ended:
            main(list(args))
        return ended.value.code

    direction = str(split.with_name("r.npy"))
    assert cli("edit", str(split), "-d", direction, "-o", str(tmp_path / "e.gguf")) == 0
    said = "".join(capsys.readouterr().out.split())
    assert f"{tmp_path}/e-00001-of-00003.gguf:" in said and "chartsbesideit,ine.abliteration/report.html" in said
    capsys.readouterr()
    for name, already in ((tmp_path / "e.gguf", True), (split, False)):
        assert cli("inspect", str(name)) == 0
        assert ("edited already" in capsys.readouterr().out) == already
    assert cli("edit", str(split), "-d", str(tmp_path / "e.gguf"), "-o", str(tmp_path / "again.gguf")) == 0
    hashed = hashes(tmp_path, "*.gguf")
    assert all(hashed[n.replace("e-", "again-")] == h for n, h in hashed.items() if n.startswith("e-"))
    capsys.readouterr()
    assert cli("undo", str(tmp_path / "e.gguf"), "-o", str(tmp_path / "base.gguf")) == 0
    assert "base-00001-of-00003.gguf:thebase;" in "".join(capsys.readouterr().out.split())


def test_two_files_are_compared(whole: Path, edited: Path, folder: Path, tmp_path: Path) -> None:
    found = at_rest.compare(str(whole), str(edited), direction=folder / "r.npy")
    assert {t.tensor for t in found.changed} | set(found.rounded) == {
        e["tensor"] for e in RunRecord.load(folder / "edited.abliteration" / "run.json").edits
    }
    assert len(found.directions) == 1 and found.cosines is not None and found.cosines[0] > 0.9
    assert found.strength == pytest.approx(1, abs=0.1) and not found.files and not found.unread
    assert at_rest.compare(str(whole), str(whole)).changed == []
    (tmp_path / "model").mkdir()
    other = g.tiny_gguf(tmp_path / "other.gguf", tokenizer__chat_template="{{ x }}")
    again = g.tiny_gguf(tmp_path / "again.gguf", tokenizer__chat_template="{{ y }}")
    assert at_rest.compare(str(other), str(again)).files == {
        "metadata": ['tokenizer.chat_template: "{{ x }}" → "{{ y }}"']
    }


def test_the_page_of_a_gguf_is_found_beside_it(edited: Path) -> None:
    for run in (edited, edited.with_name("edited.abliteration"), edited.with_name("edited.abliteration") / "run.json"):
        assert results.report(run) == edited.with_name("edited.abliteration") / "report.html"
    assert "# edited.gguf" in results.card(edited) and "library_name: gguf" in results.card(edited)
    with pytest.raises(CheckpointError, match=r"there is no .*none\.abliteration"):
        results.report(edited.with_name("none.gguf"))


def test_files_that_are_no_model_end_an_edit_in_one_line(
    whole: Path, split: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = whole.read_bytes()
    broken = {
        "truncated": raw[: len(raw) // 2], "magic": b"GGML" + raw[4:], "version": raw[:4] + b"\x09" + raw[5:],
        "counts": raw[:8] + b"\xff" * 16 + raw[24:], "length": raw[:24] + b"\xff" * 8 + raw[32:], "empty": b"",
    }  # fmt: skip
    for name, data in broken.items():
        (tmp_path / f"{name}.gguf").write_bytes(data)
    for part in folder.glob("parts-*"):
        if "00002" not in part.name:
            shutil.copy(part, tmp_path)
    sources = {name: 4 if name == "version" else 3 for name in broken} | {split.stem: 3, "absent": 3}
    for name, code in sources.items():
        out = tmp_path / "out.gguf"
        with pytest.raises(SystemExit) as ended:
            main(["edit", str(tmp_path / f"{name}.gguf"), "-d", str(folder / "r.npy"), "-o", str(out)])
        said = capsys.readouterr()
        assert (ended.value.code, said.out) == (code, "") and said.err.startswith("error: ")
        assert len(said.err.splitlines()) == 1
    assert not list(tmp_path.glob("out*"))


def test_an_edited_gguf_is_exported_by_its_name_whole_or_split(folder: Path, split: Path, tmp_path: Path) -> None:
    edit(split, tmp_path / "edited.gguf")
    names = ("edited-00001-of-00003.gguf", "edited.abliteration", "edited.abliteration/run.json")
    for i, name in enumerate(names):
        found = export(tmp_path / name, tmp_path / f"vector-{i}.gguf", layer=1, scale=2.0)
        assert found.model_type == "llama" and found.vectors == [{"layer": 1, "length": pytest.approx(2.0)}]
        assert np.allclose(np.abs(load_given(tmp_path / f"vector-{i}.gguf").vector @ R), 1, atol=1e-6)
    assert export(tmp_path / "edited.gguf", tmp_path / "whole.gguf", layer=1).model_type == "llama"
    assert export(tmp_path / "vector-0.gguf", tmp_path / "again.gguf", layer=1).model_type == "unknown"
    with pytest.raises(UnsupportedError, match="a GGUF of 'llama'"):
        export(split, tmp_path / "of-the-base.gguf")
