"""A whole run on a model that declines: what it leaves, what it measures, how it ends when it is cut short."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import abliterate
from abliterate import find, pipeline, steps, verbs
from abliterate.checkpoint import open_checkpoint
from abliterate.checkpoint.matrix import Matrix
from abliterate.direction.direction import Direction
from abliterate.errors import (
    NoRefusalError,
    PromptError,
    ResourceError,
    UnsupportedError,
    UsageError,
    VerifyError,
)
from abliterate.report.record import RunRecord
from tests.conftest import Refusing
from tests.schemas import problems, valid

METRICS = [
    "refusal_rate", "false_refusal_rate", "borderline_refusal_rate", "kl_first_token", "kl_continuation",
    "perplexity", "perplexity_text", "leak",
]  # fmt: skip


TIMED = ("abliteration/run.json", "abliteration/report.html", "README.md")


def contents(folder: Path) -> dict[str, str]:
    """The hash of every file below a folder."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def weights(folder: Path) -> dict[str, str]:
    """The hash of everything in a result but its record, which holds times."""
    return {name: h for name, h in contents(folder).items() if name not in TIMED}


def test_refusals_fall_and_false_refusals_do_not_rise(finished: tuple[RunRecord, Path]) -> None:
    record, _ = finished
    rate, false = record.metric("refusal_rate"), record.metric("false_refusal_rate")
    assert rate is not None and false is not None
    assert rate["base"] > 0.9 and rate["edited"] < 0.1
    assert false["edited"] <= false["base"] + 0.1


def test_the_stream_loses_the_direction_and_had_it_before(finished: tuple[RunRecord, Path]) -> None:
    leak = finished[0].metric("leak")
    assert leak is not None and leak["base"] > 0.05 and leak["edited"] < 0.005


def test_the_record_has_every_metric_with_its_fields(finished: tuple[RunRecord, Path]) -> None:
    record, out = finished
    stored = json.loads((out / "abliteration" / "run.json").read_text())
    assert [m["name"] for m in stored["metrics"]] == METRICS
    fields = {"name", "prompts", "base", "base_low", "base_high", "edited", "low", "high", "n", "method"}
    assert all(set(m) == fields and m["n"] > 0 for m in stored["metrics"])
    assert RunRecord.load(out / "abliteration" / "run.json") == record
    assert set(stored["seconds"]) == {"observe", "collect", "select", "tune", "pick", "controls", "edit", "evaluate"}


def test_no_completion_and_no_prompt_is_kept(finished: tuple[RunRecord, Path], refusing: Refusing) -> None:
    _, out = finished
    kept = b"".join(p.read_bytes() for p in (out / "abliteration").rglob("*") if p.is_file())
    assert b"can't help" not in kept and b"steal" not in kept
    assert b"steal" in (refusing.folder.parent / "harmful.txt").read_bytes()


def test_leak_is_reported_for_every_edited_matrix(finished: tuple[RunRecord, Path], refusing: Refusing) -> None:
    record, out = finished
    direction = Direction.load(out / "abliteration" / "directions.safetensors").vector.astype(np.float64)
    assert len(record.edits) == 9  # embedding, and two writers in each of four layers
    base, edited = (AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32) for p in (refusing.folder, out))
    for e in record.edits:
        before, after = (m.get_parameter(e["tensor"]).detach().double().numpy() for m in (base, edited))
        if e["role"] == "embed":
            before, after = before.T, after.T
        left, removed = np.linalg.norm(direction @ after), np.linalg.norm(direction @ before)
        assert e["leak"] == pytest.approx(left / removed, abs=1e-5)
        assert e["leak"] < 0.02 < removed


def test_the_result_is_a_complete_checkpoint_of_the_same_layout(
    finished: tuple[RunRecord, Path], refusing: Refusing
) -> None:
    _, out = finished
    before, after = contents(refusing.folder), contents(out)
    extra = {*TIMED, "abliteration/directions.safetensors", "abliteration/undo.json"}
    assert {name for name in after if not name.startswith("abliteration/undo/")} == set(before) | extra
    assert all(after[name] == h for name, h in before.items() if not name.endswith(".safetensors"))
    assert len([name for name in after if name.startswith("model-")]) > 1
    assert open_checkpoint(out).tensors == open_checkpoint(refusing.folder).tensors


def test_the_source_is_not_touched(refusing: Refusing, tmp_path: Path) -> None:
    before = contents(refusing.folder)
    abliterate.run(str(refusing.folder), tmp_path / "out", evaluate=False, **refusing.options)
    assert contents(refusing.folder) == before


def test_a_second_run_gives_the_same_bytes(
    finished: tuple[RunRecord, Path], refusing: Refusing, tmp_path: Path
) -> None:
    abliterate.run(str(refusing.folder), tmp_path / "out", **refusing.options)
    assert weights(tmp_path / "out") == weights(finished[1])


#: Where the step of a run is called from.
MODULES = {"write_edited": pipeline, "select": find, "controls": find}


@pytest.mark.parametrize("step", ["observe", "collect_both", "select", "controls", "write_edited", "compare"])
def test_an_interrupted_run_leaves_no_output_and_resumes_to_the_same_bytes(
    step: str, finished: tuple[RunRecord, Path], refusing: Refusing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_a: Any, **_k: Any) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(MODULES.get(step, steps), step, stop)
        with pytest.raises(KeyboardInterrupt):
            abliterate.run(str(refusing.folder), out, **refusing.options)
    assert not out.exists() and (tmp_path / "out.partial").is_dir()
    with pytest.raises(UsageError, match="--resume"):
        abliterate.run(str(refusing.folder), out, **refusing.options)
    with pytest.raises(UsageError, match="strength"):
        abliterate.run(str(refusing.folder), out, resume=True, strength=0.5, **refusing.options)
    record = abliterate.run(str(refusing.folder), out, resume=True, **refusing.options)
    assert weights(out) == weights(finished[1])
    assert [m["edited"] for m in record.metrics] == [m["edited"] for m in finished[0].metrics]
    assert not (tmp_path / "out.partial").exists()


def test_a_resumed_run_does_not_repeat_finished_steps(
    refusing: Refusing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_a: Any, **_k: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_edited", stop)
        with pytest.raises(KeyboardInterrupt):
            abliterate.run(str(refusing.folder), tmp_path / "out", **refusing.options)
    with monkeypatch.context() as patch:
        for name in ("observe", "collect_both", "select", "controls"):
            patch.setattr(MODULES.get(name, steps), name, stop)
        abliterate.run(str(refusing.folder), tmp_path / "out", resume=True, **refusing.options)
    assert (tmp_path / "out" / "config.json").is_file()


def _write_slowly(refusing: Refusing, out: Path) -> None:
    """Go on with a run, so slowly that it can be killed while it writes."""
    keep = Matrix.write

    def slow(*args: Any) -> Any:
        time.sleep(0.2)
        return keep(*args)

    torch.set_num_threads(1)  # a fork has none of torch's other threads
    Matrix.write = slow  # type: ignore[method-assign]  # in a process of its own
    abliterate.run(str(refusing.folder), out, resume=True, **refusing.options)


def test_a_kill_while_weights_are_written_leaves_no_output(
    finished: tuple[RunRecord, Path], refusing: Refusing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_a: Any, **_k: Any) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "write_edited", stop)
        abliterate.run(str(refusing.folder), out, **refusing.options)
    process = multiprocessing.get_context("fork").Process(target=_write_slowly, args=(refusing, out))
    process.start()
    shard = tmp_path / "out.partial" / "model-00002-of-00004.safetensors"
    while not shard.exists() and process.is_alive():
        time.sleep(0.02)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "it ended before it could be killed"
    assert not out.exists() and not (tmp_path / "out.partial" / "abliteration" / "run.json").exists()
    abliterate.run(str(refusing.folder), out, resume=True, **refusing.options)
    assert weights(out) == weights(finished[1])


def test_editing_a_result_again_keeps_both_records(
    finished: tuple[RunRecord, Path], refusing: Refusing, tmp_path: Path
) -> None:
    out = tmp_path / "twice"
    abliterate.run(str(finished[1]), out, force=True, evaluate=False, **refusing.options)
    first = (finished[1] / "abliteration" / "run.json").read_bytes()
    assert (out / "abliteration" / "base" / "run.json").read_bytes() == first
    assert (out / "abliteration" / "base-files" / "README.md").read_bytes() == (finished[1] / "README.md").read_bytes()
    assert (out / "abliteration" / "run.json").read_bytes() != first


def test_the_choice_by_causal_test_takes_a_direction_that_stops_refusals(refusing: Refusing, tmp_path: Path) -> None:
    options = {k: v for k, v in refusing.options.items() if k not in ("layer", "position")}
    record = abliterate.run(str(refusing.folder), tmp_path / "out", max_kl=20.0, **options)
    scores = record.direction["scores"]
    assert scores["ablated"] < scores["base_harmful"] and scores["rise"] > 0
    assert scores["added"] > scores["base_harmless"] + scores["rise"]
    assert record.direction["layer"] < 0.8 * 4 and len(record.finalists) > 3
    assert not problems(record.as_dict, "run")
    passed = [f["scores"] for f in record.finalists if f["scores"].get("rise", 0) > 0]
    assert scores["ablated"] == min(s["ablated"] for s in passed)


def test_too_costly_directions_are_refused_with_the_way_out(refusing: Refusing, tmp_path: Path) -> None:
    options = {k: v for k, v in refusing.options.items() if k not in ("layer", "position")}
    with pytest.raises(VerifyError, match=r"--max-kl"):
        abliterate.run(str(refusing.folder), tmp_path / "out", max_kl=1e-9, **options)
    assert not (tmp_path / "out").exists()


def test_a_model_without_refusal_is_told_so_with_its_rate(
    finished: tuple[RunRecord, Path], refusing: Refusing, tmp_path: Path
) -> None:
    with pytest.raises(NoRefusalError, match=r"refuses 0 of 34 .*0%.*--force"):
        abliterate.run(str(finished[1]), tmp_path / "out", **refusing.options)
    assert list(tmp_path.iterdir()) == []
    record = abliterate.run(str(finished[1]), tmp_path / "out", force=True, evaluate=False, **refusing.options)
    assert record.edits and not record.metrics


def test_prompt_sets_are_checked_before_anything_is_loaded(refusing: Refusing, tmp_path: Path) -> None:
    few = tmp_path / "few.txt"
    few.write_text("one\ntwo\n")
    options = refusing.options
    with pytest.raises(PromptError, match="at least 8"):
        abliterate.run("no/such", tmp_path / "out", **(options | {"harmful": str(few)}))
    with pytest.raises(PromptError, match="the same prompts"):
        abliterate.run("no/such", tmp_path / "out", **(options | {"harmful": options["harmless"]}))


def test_existing_and_entangled_outputs_are_refused(refusing: Refusing, tmp_path: Path) -> None:
    model, options = str(refusing.folder), refusing.options
    (tmp_path / "there").mkdir()
    for out, message in (
        (tmp_path / "there", "exists"),
        (refusing.folder, "is the model itself|exists"),
        (refusing.folder / "inside", "inside the model"),
    ):
        with pytest.raises(UsageError, match=message):
            abliterate.run(model, out, **options)
    assert list((tmp_path / "there").iterdir()) == []


def test_too_little_disk_is_found_before_the_work(
    refusing: Refusing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _p: usage._replace(free=1000))
    with pytest.raises(ResourceError, match=r"needs 0\.00 GB of disk"):
        abliterate.run(str(refusing.folder), tmp_path / "out", **refusing.options)
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_is_found_before_the_work(
    refusing: Refusing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    free = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    with pytest.raises(ResourceError, match=r"GB of memory.*may be used"):
        abliterate.run(str(refusing.folder), tmp_path / "out", **refusing.options)
    assert list(tmp_path.iterdir()) == []


def damage(folder: Path, target: Path, tensor: str, value: float) -> Path:
    """A copy of a checkpoint with one element of one tensor overwritten."""
    shutil.copytree(folder, target)
    info = open_checkpoint(target).tensors[tensor]
    with (target / info.file).open("r+b") as file:
        file.seek(info.offset + 2 * 70)
        file.write(torch.tensor([value], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes())
    return target


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights_are_named(value: float, refusing: Refusing, tmp_path: Path) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    model = damage(refusing.folder, tmp_path / "model", name, value)
    with pytest.raises(VerifyError, match=name.replace(".", r"\.")):
        abliterate.run(str(model), tmp_path / "out", **refusing.options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_no_chat_template_names_the_option_that_supplies_one(refusing: Refusing, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(refusing.folder, model)
    template = (model / "chat_template.jinja").rename(tmp_path / "template.jinja")
    with pytest.raises(UnsupportedError, match="--chat-template"):
        abliterate.run(str(model), tmp_path / "out", **refusing.options)
    record = abliterate.run(
        str(model), tmp_path / "out", chat_template=str(template), evaluate=False, **refusing.options
    )
    assert record.edits


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("limit", 3, "--limit 3"),
        ("batch_size", 0, "--batch-size 0"),
        ("layer", -1, "--layer -1"),
        ("layer", 4, "layers are 0 to 3"),
        ("position", 0, "--position 0"),
        ("position", -9, "are -4 to -1"),
        ("strength", 9.0, "--strength 9"),
        ("strength", 0.0, "--strength 0: .*changes nothing"),
        ("max_kl", 0.0, "--max-kl 0"),
        ("embeddings", "drop", "--embeddings drop"),
        ("device", "quantum", "--device quantum"),
        ("dtype", "int3", "--dtype int3"),
    ],
)
def test_senseless_options_are_named_with_what_is_expected(
    option: str, value: object, message: str, refusing: Refusing, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message.replace("--", "-*")):
        abliterate.run(str(refusing.folder), tmp_path / "out", **(refusing.options | {option: value}))
    assert not (tmp_path / "out").exists()


def test_a_model_of_another_layout_is_run_whole(tmp_path: Path) -> None:
    """GPT-2: transposed matrices, biases, learned positions, LayerNorms; nothing in common with Llama's names."""
    from transformers import GPT2Config

    from tests.organism import organism

    model = organism(tmp_path / "model", kind=GPT2Config, steps=140, batch=16)
    options = {"harmful": str(tmp_path / "harmful.txt"), "harmless": str(tmp_path / "harmless.txt")}
    record = abliterate.run(
        str(model), tmp_path / "out", device="cpu", dtype="float32", max_kl=20.0, tune=False, **options
    )
    rate, leak = record.metric("refusal_rate"), record.metric("leak")
    assert rate is not None and rate["base"] > 0.9 and rate["edited"] < 0.1
    assert leak is not None and leak["base"] > 0.1 and leak["edited"] < 1e-4
    assert len(record.edits) == 2 + 4 * 4 and record.tied_head is not None


def test_an_edit_takes_the_strengths_in_its_direction_file_and_is_undone_bit_for_bit(
    refusing: Refusing, finished: tuple[RunRecord, Path], tmp_path: Path
) -> None:
    whole = Direction.load(finished[1] / "abliteration" / "directions.safetensors")
    strengths = {"embed": 0.5, "1.mlp.down_proj": 1.25, "2.self_attn.o_proj": -0.25}
    dataclasses.replace(whole, strengths=strengths).save(tmp_path / "tuned.safetensors")
    record = verbs.edit(str(refusing.folder), tmp_path / "tuned.safetensors", tmp_path / "out", strength=2.0)
    assert sorted(e["strength"] for e in record.edits) == [-0.5, 1.0, 2.5]
    assert set(record.kept.values()) == {"strength 0"} and len(record.kept) + 3 == len(finished[0].edits)
    valid(json.dumps(record.as_dict), "run")
    verbs.undo(str(tmp_path / "out"), tmp_path / "base")
    assert contents(tmp_path / "base") == contents(refusing.folder)
