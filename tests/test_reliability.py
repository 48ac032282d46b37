"""Nothing is lost: edits that are killed, starved, disturbed or doubled, and models that a stranger made."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from abliterate import at_rest
from abliterate.checkpoint import Checkpoint, open_checkpoint
from abliterate.direction.direction import Direction
from abliterate.edit import apply, writers
from abliterate.edit.sidecar import _HEAD
from abliterate.edit.undo import note_sha256
from abliterate.errors import AbliterateError, CheckpointError, ResourceError, UnsupportedError, UsageError, VerifyError
from abliterate.workspace import Workspace
from bench.crash_points import contents, result
from bench.reliability import Edit, Row, finish, hub_cache, kill, run
from bench.small import TINY, Shape, generate

SHARD = "model-00002-of-00003.safetensors"
SCRIPT = Path(__file__).parent.parent / "bench" / "crash_points.py"


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a few kilobytes in three shards, a direction beside it; no test writes to it."""
    return generate(tmp_path_factory.mktemp("reliability") / "model", TINY)


@pytest.fixture(scope="session")
def edited(base: Path) -> Path:
    """What an undisturbed edit of it gives."""
    return edit(base, base.parent / "edited")


@pytest.fixture(autouse=True)
def _nothing_is_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a class writes where the names are not those that are kept takes seconds to learn; none is, here."""

    def refuse(checkpoint: Checkpoint) -> None:
        raise UnsupportedError(f"{checkpoint.path}: would have to be learned")

    monkeypatch.setattr(writers, "_learned", refuse)


@pytest.fixture
def model(base: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(base, tmp_path / "model"))


@pytest.fixture
def copy(edited: Path, tmp_path: Path) -> Path:
    """A copy of the result that a test may damage."""
    return Path(shutil.copytree(edited, tmp_path / "copy"))


def direction(folder: Path) -> Path:
    """A file in `folder` with the direction of all tests here."""
    path = folder / "r.npy"
    np.save(path, np.random.default_rng(1).standard_normal(TINY.d_model))
    return path


def edit(model: Path, out: Path, **options: Any) -> Path:
    """Edit a checkpoint into `out`."""
    at_rest.edit(str(model), direction(out.parent), out, **options)
    return out


# ------------------------------------------------------------------ killed, and out of disk


def survey(how: str, every: int, model: Path, folder: Path, *options: str) -> dict[str, Any]:
    """What `bench/crash_points.py` finds."""
    command = [
        sys.executable,
        str(SCRIPT),
        how,
        str(every),
        str(model),
        str(model.parent / "direction.npy"),
        str(folder),
    ]
    done = subprocess.run(
        [*command, *options], capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("how", ["kill", "full"])
@pytest.mark.parametrize("embeddings", ["edit", "untie"])
def test_an_edit_stopped_at_any_file_operation_goes_on_to_the_same_bytes(
    how: str, embeddings: str, tmp_path: Path
) -> None:
    shape = Shape(16, 24, 1, 20, 2) if embeddings == "edit" else Shape(16, 24, 1, 20, 1, tied=True)
    model = generate(tmp_path / "model", shape)
    (tmp_path / "work").mkdir()
    found = survey(how, 13, model, tmp_path / "work", "--embeddings", embeddings)
    assert found["wrong"] == [] and found["points"] > 10


@pytest.mark.parametrize("left", ["settings.tmp", "settings.json"])
def test_what_a_kill_leaves_at_the_very_start_is_taken_up(left: str, base: Path, edited: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), Workspace(out, base, {}, resume=False) as work:
        raise KeyboardInterrupt
    (work.steps / "settings.json").rename(work.steps / left)
    if left == "settings.json":
        with pytest.raises(UsageError, match="--resume"):
            edit(base, out)
        return
    edit(base, out)
    assert not work.folder.exists()


def test_a_kill_while_publishing_leaves_a_run_that_can_go_on_or_a_whole_result(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, out = result(edit(base, tmp_path / "expected")), tmp_path / "out"
    for where in (Path, shutil):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(where, "rename" if where is Path else "rmtree", _interrupt)
            edit(base, out, resume=True)
        assert out.exists() == (where is shutil)
    assert expected.items() <= result(out).items()


def _interrupt(*_a: object, **_k: object) -> None:
    raise KeyboardInterrupt


def test_a_few_kills_of_the_command_itself(base: Path, edited: Path, tmp_path: Path) -> None:
    edit = Edit.measure(base, direction(tmp_path), tmp_path)
    row, rng = Row("kills"), random.Random(1)
    for i in range(4):
        (tmp_path / str(i)).mkdir()
        kill(edit, row, tmp_path / str(i), rng.uniform(0.3, 1), publishing=i % 2 == 0)
    assert row.wrong == [] and row.ends.total() == 4


def test_a_resumed_edit_needs_no_room_for_what_it_has_written(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(at_rest, "finish", _interrupt)
        edit(base, out)
    usage, size = shutil.disk_usage(tmp_path), sum(p.stat().st_size for p in base.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _p: usage._replace(free=size // 2))
    with pytest.raises(ResourceError, match=r"needs 0\.00 GB"):
        edit(base, tmp_path / "another")
    assert edit(base, out, resume=True).is_dir()


@pytest.mark.parametrize("how", ["changed", "cut", "gone"])
def test_finished_files_damaged_before_an_edit_is_resumed_are_not_published(
    how: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(at_rest, "finish", _interrupt)
        edit(base, out)
    shard = tmp_path / "out.partial" / SHARD
    tensor = next(t for t in open_checkpoint(base).tensors.values() if t.file == SHARD and "down_proj" in t.name)
    if how == "gone":
        shard.unlink()
    elif how == "cut":
        os.truncate(shard, tensor.offset)
    else:
        with shard.open("r+b") as file:
            file.seek(tensor.offset)
            file.write(b"12345678")
    with pytest.raises(CheckpointError, match=r"damaged.*delete it"):
        edit(base, out, resume=True)
    assert not out.exists()


def test_a_full_disk_is_an_error_of_ours_whatever_is_written(tmp_path: Path) -> None:
    full = tmp_path / "full"  # a link, so that no mistake can put a file in the device's place
    full.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        Direction(np.ones(1, np.float32), None, None, 1.0).save(full)
    with pytest.raises(ResourceError, match=r"No space left.*start again"), Workspace(tmp_path / "o", None, {}, False):
        full.write_text("x")
    assert list(tmp_path.iterdir()) == [full]


# ------------------------------------------------------------------ files that change, places that are closed


def shrink(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size // 2)


def replace(shard: Path) -> None:
    new = shard.with_name("new")
    new.write_bytes(shard.read_bytes()[:-64] + bytes(64))
    new.replace(shard)


def rewrite(shard: Path) -> None:
    with shard.open("r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(bytes(64))


@pytest.mark.parametrize("change", [shrink, replace, rewrite, Path.unlink])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_source_file_that_changes_while_it_is_read_is_named(
    change: Callable[[Path], None], after: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, count = apply.ShardEdit, iter(range(9))

    def changing(*args: Any) -> Any:
        if next(count) == after:
            change(model / SHARD)
        return begin(*args)

    monkeypatch.setattr(apply, "ShardEdit", changing)
    with pytest.raises((VerifyError, ResourceError), match=SHARD):
        edit(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert change is Path.unlink or not (tmp_path / "out.partial").exists()


def test_a_file_that_shrinks_after_it_was_projected_is_not_hashed_as_if_it_were_whole(model: Path) -> None:
    from abliterate.checkpoint.stream import tensor_sha256

    tensor = next(t for t in open_checkpoint(model).tensors.values() if t.file == SHARD)
    os.truncate(model / SHARD, tensor.offset + 3)
    with (model / SHARD).open("rb") as file, pytest.raises(VerifyError, match=f"ended while '{tensor.name}'"):
        tensor_sha256(file.fileno(), tensor)


def test_a_snapshot_in_the_hubs_cache_is_edited_as_the_files_it_leads_to(
    base: Path, edited: Path, tmp_path: Path
) -> None:
    row, whole = Row("hub"), Edit(base, direction(tmp_path), contents(base), result(edited), 0, 0, 0)
    hub_cache(whole, row, tmp_path)
    assert row.wrong == [] and row.ends == {"exit 0": 1}


def test_two_edits_at_once_are_one_edit_and_one_clear_error(base: Path, edited: Path, tmp_path: Path) -> None:
    ends = []

    def start() -> None:
        ends.append(finish(run(base, direction(tmp_path), tmp_path / "out")))

    threads = [threading.Thread(target=start) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(status for status, _ in ends) == [0, 2, 2]
    assert all("error: " in m and "Traceback" not in m for status, m in ends if status)
    assert result(tmp_path / "out") == result(edited) and not (tmp_path / "out.partial").exists()


def test_a_folder_that_another_run_has_published_or_claimed_is_not_removed(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Workspace(out, base, {}, resume=False) as work:
        work.folder.rename(tmp_path / "elsewhere")
        with Workspace(out, base, {}, resume=False) as other:
            work.discard()
            assert other.folder.is_dir()


def test_outputs_that_cannot_be_made_are_named(base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "real").mkdir()
    (tmp_path / "link.partial").symlink_to("real")
    for out in (tmp_path / "file" / "out", tmp_path / "link"):
        with pytest.raises(ResourceError, match="cannot create it"):
            at_rest.edit(str(base), direction(tmp_path), out)
    assert list((tmp_path / "real").iterdir()) == []


def test_an_output_that_no_record_can_name_is_refused_before_the_work(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="UTF-8"):
        edit(base, Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff")))


@pytest.mark.parametrize("kind", ["npz", "huge", "zip"])
def test_directions_that_are_no_arrays_are_refused_in_little_memory(kind: str, base: Path, tmp_path: Path) -> None:
    path, shape = tmp_path / "d.npy", "(1099511627776,)"
    head = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    with path.open("wb") as file:
        if kind == "npz":
            np.savez(file, np.ones(3))
        else:
            file.write(
                b"PK\x03\x04" if kind == "zip" else b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + head.encode()
            )
    with pytest.raises(CheckpointError, match=r"d\.npy: cannot be read as a NumPy array"):
        at_rest.edit(str(base), path, tmp_path / "out")


@pytest.mark.parametrize("shape", [(3,), (1,), (), (16, 2), (16, 0)])
def test_a_gain_of_another_shape_is_named(shape: tuple[int, ...], tmp_path: Path) -> None:
    model, gain = (
        generate(tmp_path / "model", Shape(16, 24, 1, 20, 1)),
        "model.layers.0.post_attention_layernorm.weight",
    )
    tensors = load_file(model / "model.safetensors") | {gain: np.ones(shape, np.float16)}
    for name in ("pre_feedforward_layernorm", "post_feedforward_layernorm"):
        tensors[f"model.layers.0.{name}.weight"] = np.ones(16, np.float16)
    save_file(tensors, model / "model.safetensors")
    write_config(model, model_type="gemma2")
    with pytest.raises(VerifyError, match=f"the gain '{gain}'.*expected 16 numbers"):
        edit(model, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_closed_folder_is_named(base: Path, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(0o555)
    with pytest.raises(ResourceError, match="Permission denied"):
        at_rest.edit(str(base), direction(tmp_path), tmp_path / "closed" / "out")


# ------------------------------------------------------------------ models that a stranger made


def refused(model: Path, tmp_path: Path, *kinds: type[AbliterateError]) -> str:
    """The message with which an edit is refused; nothing is written, and little memory taken."""
    direction(tmp_path)
    before = contents(tmp_path)
    tracemalloc.start()
    try:
        with pytest.raises(kinds or AbliterateError) as error:
            edit(model, tmp_path / "out")
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()
    assert contents(tmp_path) == before and not (tmp_path / "out.partial").exists()
    return str(error.value)


def write_index(model: Path, **changed: str) -> None:
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= changed
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "shard", ["../x", "/etc/passwd", "folder", "fifo.safetensors", "config.json", "x\0y", "", ".", "abliteration/x"]
)
def test_an_index_that_names_something_else_than_a_shard_is_refused(shard: str, model: Path, tmp_path: Path) -> None:
    (model / "folder").mkdir()
    os.mkfifo(model / "fifo.safetensors")
    write_index(model, **{"model.norm.weight": shard})
    refused(model, tmp_path, CheckpointError)


def test_a_shard_of_the_name_of_a_record_is_refused(model: Path, tmp_path: Path) -> None:
    (model / "abliteration").mkdir()
    name = "abliteration/directions.safetensors"
    (model / SHARD).rename(model / name)
    text = (model / "model.safetensors.index.json").read_text()
    (model / "model.safetensors.index.json").write_text(text.replace(SHARD, name))
    assert name in refused(model, tmp_path, CheckpointError)


def test_shards_in_folders_are_edited_like_others(model: Path, edited: Path, tmp_path: Path) -> None:
    (model / "weights").mkdir()
    (model / SHARD).rename(model / "weights" / SHARD)
    text = (model / "model.safetensors.index.json").read_text()
    (model / "model.safetensors.index.json").write_text(text.replace(SHARD, f"weights/{SHARD}"))
    edit(model, tmp_path / "out")
    assert (tmp_path / "out" / "weights" / SHARD).read_bytes() == (edited / SHARD).read_bytes()
    at_rest.undo(str(tmp_path / "out"), tmp_path / "again")
    assert contents(tmp_path / "again") == contents(model)


@pytest.mark.parametrize("name", [SHARD, "tokenizer.json", "config.json", "notes.txt"])
def test_links_that_lead_out_of_the_model_are_not_followed(name: str, model: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    if (model / name).exists():
        (model / name).rename(secret)
    else:
        secret.write_text("secret")
    (model / name).symlink_to(secret)
    assert "leads out of the model" in refused(model, tmp_path, CheckpointError)
    (model / name).unlink()
    (model / "real").write_bytes(secret.read_bytes())
    (model / name).symlink_to("real")
    edit(model, tmp_path / "out")


def write_config(model: Path, **changed: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


WRONG = [None, True, -1, 0, 10**12, 10**400, 1.5, float("nan"), float("inf"), "3", "", [], [1], {}, {"a": 1}]


@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_numbers_of_layers_that_are_none_are_refused(value: Any, model: Path, tmp_path: Path) -> None:
    write_config(model, num_hidden_layers=value)
    refused(model, tmp_path, UnsupportedError, CheckpointError)


@pytest.mark.parametrize("value", [v for v in WRONG if not isinstance(v, str)], ids=repr)
def test_types_of_models_that_are_no_names_are_refused(value: Any, model: Path, tmp_path: Path) -> None:
    write_config(model, model_type=value)
    refused(model, tmp_path, CheckpointError)


@pytest.mark.parametrize("value", [v for v in WRONG if v], ids=repr)
def test_quantisation_of_the_wrong_type_is_refused(value: Any, model: Path, tmp_path: Path) -> None:
    write_config(model, quantization_config=value)
    refused(model, tmp_path, UnsupportedError, CheckpointError)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{" * 100_000,
        b'{"a":' * 900 + b"1" + b"}" * 900,
        b'{"a": 1' + b"0" * 5000 + b"}",
    ],
    ids=lambda text: text[:12].decode("latin-1"),
)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_that_is_none_is_refused(name: str, text: bytes, model: Path, tmp_path: Path) -> None:
    (model / name).write_bytes(text)
    refused(model, tmp_path, CheckpointError)


def test_a_huge_json_file_is_not_read(model: Path, tmp_path: Path) -> None:
    os.truncate(model / "config.json", 1 << 27)  # a hole, not bytes
    assert "at most" in refused(model, tmp_path, CheckpointError)


def write_shard(model: Path, change: Callable[[dict[str, Any]], None], data: bytes = b"") -> None:
    """Change the header of a shard, and perhaps what follows it."""
    raw = (model / SHARD).read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    (model / SHARD).write_bytes(struct.pack("<Q", len(text)) + text + (data or raw[8 + length :]))


@pytest.mark.parametrize("shape", [[0, 16], [16, 0], [1 << 62, 0], [0, 16, 0], [1 << 50, 16, 0], [0], []])
def test_writers_without_elements_or_of_another_rank_are_refused(shape: list[int], tmp_path: Path) -> None:
    model = generate(tmp_path / "model", Shape(16, 24, 1, 20, 1))
    path = model / "model.safetensors"
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.o_proj.weight"):
        begin, end = header[name]["data_offsets"]
        kept = int(np.prod(shape, dtype=object)) * 2
        header2 = {k: dict(v) for k, v in header.items()}
        header2[name] |= {"shape": shape, "data_offsets": [begin, begin + kept]}
        for other in header2.values():
            if "data_offsets" in other and other["data_offsets"][0] >= end:
                other["data_offsets"] = [x - (end - begin - kept) for x in other["data_offsets"]]
        text = json.dumps(header2).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[: begin + kept] + data[end:])
        refused(model, tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where in a JSON value something stands."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(p for key, v in inner for p in places(v, (*at, key)))]


@st.composite
def damage(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with something else in up to three places of it, or nothing."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        *at, last = draw(st.sampled_from(places(value)[1:] or [("x",)]))
        inner = value
        for key in at:
            inner = inner[key]
        if draw(st.booleans()) or isinstance(inner, list):
            inner[last] = draw(JSON | st.sampled_from([inner[last], 10**12, "../x"]))
        elif draw(st.booleans()):
            inner[draw(st.text(max_size=5))] = inner.pop(last)
        else:
            del inner[last]
        if not places(value)[1:]:
            break
    return value


#: `FUZZ_EXAMPLES=3000 uv run pytest tests/test_reliability.py -k any` looks longer.
FUZZ = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "40")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)


def planned(model: Path) -> None:
    """Edit and undo where that is possible, else errors of ours; and no files elsewhere."""
    out, back = model.with_name("out"), model.with_name("back")
    direction(model.parent)
    for folder in (out, back):
        shutil.rmtree(folder, ignore_errors=True)
    siblings = set(model.parent.iterdir())
    try:
        edit(model, out)
        at_rest.undo(str(out), back)
        assert contents(back) == contents(model)
    except AbliterateError:
        assert not back.exists()
    assert set(model.parent.iterdir()) <= siblings | {out, back}


@FUZZ
@given(data=st.data())
def test_any_header_is_edited_or_refused(
    data: st.DataObject, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = Path(shutil.copytree(base, tmp_path_factory.mktemp("fuzz") / "model"))
    raw = (model / SHARD).read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = data.draw(damage(json.loads(raw[8 : 8 + length])))
    text = json.dumps(header).encode()
    (model / SHARD).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    planned(model)


@FUZZ
@given(at=st.integers(0, 10_000), new=st.binary(max_size=20), cut=st.integers(0, 20), shard=st.sampled_from([1, 2, 3]))
def test_any_bytes_in_a_shard_are_edited_or_refused(
    at: int, new: bytes, cut: int, shard: int, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = Path(shutil.copytree(base, tmp_path_factory.mktemp("fuzz") / "model"))
    path = model / f"model-0000{shard}-of-00003.safetensors"
    raw = path.read_bytes()
    at %= 8 + struct.unpack("<Q", raw[:8])[0]
    path.write_bytes(raw[:at] + new + raw[at + cut :])
    planned(model)


@FUZZ
@given(data=st.data())
def test_any_index_is_edited_or_refused(
    data: st.DataObject, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = Path(shutil.copytree(base, tmp_path_factory.mktemp("fuzz") / "model"))
    path = model / "model.safetensors.index.json"
    path.write_text(json.dumps(data.draw(damage(json.loads(path.read_text())))))
    planned(model)


# ------------------------------------------------------------------ ways back that a stranger made


def undone(copy: Path, base: Path, files: tuple[str, ...] = ("",)) -> str | None:
    """Undo a damaged result: either the base's files of such names come out, or an error of ours and nothing."""
    out = copy.with_name("base")
    shutil.rmtree(out, ignore_errors=True)
    before, tree = contents(copy), {p for p in copy.parent.rglob("*") if out not in p.parents and p != out}
    tracemalloc.start()
    try:
        at_rest.undo(str(copy), out)
        found, wanted = contents(out), contents(base)
        assert all(found.get(name) == digest for name, digest in wanted.items() if name.startswith(files))
        return None
    except AbliterateError as error:
        assert not out.exists()
        return str(error)
    finally:
        assert tracemalloc.get_traced_memory()[1] < 100e6
        tracemalloc.stop()
        assert contents(copy) == before
        assert {p for p in copy.parent.rglob("*") if out not in p.parents and p != out} == tree


def signed(note: Any) -> Any:
    """A note that claims to be as it was written, as a stranger would make it."""
    if isinstance(note, dict):
        note["sha256"] = note_sha256({k: v for k, v in note.items() if k not in ("schema", "sha256")})
    return note


@pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped", "a/../../escaped", "", "a\0b", "abliteration", "."])
@pytest.mark.parametrize("where", ["file", "stored_as", "sidecar", "side_files"])
def test_a_note_that_leads_elsewhere_is_refused(where: str, name: str, copy: Path, base: Path) -> None:
    path = copy / "abliteration" / "undo.json"
    note = json.loads(path.read_text())
    if where == "side_files":
        note["side_files"][name] = note["side_files"].pop("tokenizer.json")
    else:
        note["files"][1][where] = name
    path.write_text(json.dumps(signed(note)))
    assert undone(copy, base) is not None


@pytest.mark.parametrize("value", [None, [], 5, "x", {"a": 1}, [["a", "b"]], [{}]], ids=repr)
@pytest.mark.parametrize("where", ["schema", "sha256", "base", "files", "side_files"])
def test_a_note_of_other_types_is_refused(where: str, value: Any, copy: Path, base: Path) -> None:
    path = copy / "abliteration" / "undo.json"
    path.write_text(json.dumps(signed(json.loads(path.read_text()) | {where: value})))
    undone(copy, base, ("config.json", "model-"))


@FUZZ
@given(data=st.data(), sign=st.booleans())
def test_any_note_restores_the_base_or_is_refused(
    data: st.DataObject, sign: bool, base: Path, edited: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    copy = Path(shutil.copytree(edited, tmp_path_factory.mktemp("undo") / "copy"))
    path = copy / "abliteration" / "undo.json"
    note = data.draw(damage(json.loads(path.read_text())))
    path.write_text(json.dumps(signed(note) if sign else note))
    undone(copy, base, ("config.json", "model-") if sign else ("",))


@FUZZ
@given(at=st.integers(0, 100_000), new=st.binary(max_size=12), cut=st.integers(0, 12))
def test_any_bytes_of_a_way_back_restore_the_base_or_are_refused(
    at: int, new: bytes, cut: int, base: Path, edited: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    copy = Path(shutil.copytree(edited, tmp_path_factory.mktemp("undo") / "copy"))
    path = copy / "abliteration" / "undo" / "00001.undo"
    raw = path.read_bytes()
    at %= len(raw)
    path.write_bytes(raw[:at] + new + raw[at + cut :])
    undone(copy, base)


HEADS = {
    "a bomb": ((0, 0, 0, 1, 24, False, 0, 0), bytes(1 << 28)),
    "rows beyond the tensor": ((0, 0, 2, 1, 0, False, 0, 0), struct.pack("<IIff", 3, 16, 1, 1)),
    "rows out of order": ((0, 0, 2, 1, 0, False, 0, 0), struct.pack("<IIff", 3, 3, 1, 1)),
    "a factor of no direction": ((0, 0, 0, 0, 24, False, 0, 0), b""),
    "a huge factor": ((0, 0, 0, 65535, 1 << 31, False, 0, 0), b""),
    "words beyond the rows": ((0, 0, 1, 1, 0, False, 1, 4_000_000), struct.pack("<IfIH", 0, 1, 0, 1)),
    "words that are cut": ((0, 0, 1, 1, 0, False, 1, 0), struct.pack("<IfI", 0, 1, 0)),
    "a tensor that is not there": ((9, 0, 0, 1, 24, False, 0, 0), bytes(96)),
}


@pytest.mark.parametrize("size", [None, 1 << 62])
@pytest.mark.parametrize("what", HEADS)
def test_records_that_do_not_fit_their_tensor_are_refused(what: str, size: int | None, copy: Path, base: Path) -> None:
    head, data = HEADS[what]
    path = copy / "abliteration" / "undo" / "00001.undo"
    right = zstandard.compress(bytes(96))
    packed = zstandard.compress(data)
    fine = _HEAD.pack(0, 0, 0, 1, 24, False, 0, 0, len(right)) + right
    path.write_bytes(fine + _HEAD.pack(*head, size or len(packed)) + packed)
    message = undone(copy, base)
    assert message is not None and "damaged" in message and "00001.undo" in message
