"""Hub ids, through the hub's own client and a local stand-in server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from abliterate.checkpoint.source import resolve_model
from abliterate.errors import CheckpointError, HubError
from tests.conftest import Refusing
from tests.hub import COMMITS, serving

RESOLVE = """
import sys
from abliterate.checkpoint.source import download
from abliterate.errors import HubError
try:
    print(download(*sys.argv[1:]))
except HubError as error:
    print("HubError", error)
"""


def resolve(hub_id: str, cache: Path, url: str, *more: str, **env: str) -> str:
    """What `download` returns or raises, in a process whose hub client knows only the stand-in."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    settings = {"HF_ENDPOINT": url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", **env}
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE, hub_id, *more],
        capture_output=True,
        text=True,
        check=False,
        env=clean | settings,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_hub_id_is_downloaded_cached_and_found_offline(refusing: Refusing, tmp_path: Path) -> None:
    with serving(models__org__tiny=refusing.folder) as hub:
        found = Path(resolve("org/tiny", tmp_path, hub.url))
        assert found.name == COMMITS["main"]
        for file in refusing.folder.iterdir():
            assert (found / file.name).read_bytes() == file.read_bytes()
        asked = len(hub.requests)
        assert Path(resolve("org/tiny", tmp_path, hub.url, HF_HUB_OFFLINE="1")) == found
        assert len(hub.requests) == asked
    assert Path(resolve("org/tiny", tmp_path, hub.url)) == found  # the server is gone, the cache is not


def test_a_revision_is_taken_as_given_and_an_unknown_one_named(refusing: Refusing, tmp_path: Path) -> None:
    with serving(models__org__tiny=refusing.folder) as hub:
        assert Path(resolve("org/tiny@v2", tmp_path, hub.url)).name == COMMITS["v2"]
        said = resolve("org/tiny@v9", tmp_path, hub.url)
        assert said.startswith("HubError org/tiny@v9") and "no revision 'v9'" in said


def test_an_unknown_id_and_an_unreachable_hub_are_told_apart(refusing: Refusing, tmp_path: Path) -> None:
    with serving(models__org__tiny=refusing.folder) as hub:
        assert "no such model on the hub" in resolve("org/other", tmp_path, hub.url)
    said = resolve("org/tiny", tmp_path, hub.url)
    assert said.startswith("HubError org/tiny") and "could not be reached" in said and "HF_ENDPOINT" in said
    assert "could not be reached" in resolve("org/tiny", tmp_path, hub.url, HF_HUB_OFFLINE="1")


def test_a_gated_model_wants_a_token_and_takes_it_from_the_environment(refusing: Refusing, tmp_path: Path) -> None:
    with serving(models__org__tiny=refusing.folder) as hub:
        hub.gated.add("models/org/tiny")
        said = resolve("org/tiny", tmp_path, hub.url)
        assert "gated" in said and "HF_TOKEN" in said
        assert Path(resolve("org/tiny", tmp_path, hub.url, HF_TOKEN="let-me-in")).is_dir()
        assert "Bearer let-me-in" in hub.tokens


def test_a_download_that_fails_half_way_is_an_error_and_not_a_checkpoint(refusing: Refusing, tmp_path: Path) -> None:
    with serving(models__org__tiny=refusing.folder) as hub:
        hub.broken_files.add("model-00002-of-00004.safetensors")
        assert resolve("org/tiny", tmp_path, hub.url).startswith("HubError org/tiny")
        hub.broken_files.clear()
        assert Path(resolve("org/tiny", tmp_path, hub.url)).is_dir()


def test_pickles_and_other_frameworks_weights_are_not_downloaded(refusing: Refusing, tmp_path: Path) -> None:
    folder = tmp_path / "repo"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "pytorch_model.bin", "tf_model.h5", "original/params.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    with serving(models__org__mixed=folder) as hub:
        found = Path(resolve("org/mixed", tmp_path / "cache", hub.url))
    assert sorted(p.name for p in found.rglob("*") if p.is_file()) == ["config.json", "model.safetensors"]


def test_a_whole_run_takes_a_hub_id_and_a_hub_data_set(
    refusing: Refusing, finished: tuple[object, Path], tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    lines = Path(refusing.options["harmful"]).read_text().splitlines()
    (data / "train.jsonl").write_text("".join(json.dumps({"prompt": line}) + "\n" for line in lines))
    arguments = refusing.arguments
    arguments[1] = "org/requests"
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    with serving(models__org__tiny=refusing.folder, datasets__org__requests=data) as hub:
        done = subprocess.run(
            [sys.executable, "-m", "abliterate", "run", "org/tiny@v2", "-o", str(tmp_path / "out"), *arguments],
            capture_output=True, text=True, check=False,
            env=clean | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for shard in finished[1].glob("model-*.safetensors"):
        assert (tmp_path / "out" / shard.name).read_bytes() == shard.read_bytes()
    assert json.loads((tmp_path / "out" / "abliteration" / "run.json").read_text())["model"] == "org/tiny@v2"


@pytest.mark.parametrize(
    ("model", "kind", "words"),
    [
        ("no-such-folder", CheckpointError, "no such folder"),
        ("./org/name", CheckpointError, "no such folder"),
        ("a/b/c", CheckpointError, "not a hub id"),
        ("weights.gguf", CheckpointError, "no such GGUF file"),
        ("org/name", HubError, "could not be reached"),
    ],
)
def test_what_is_neither_folder_nor_hub_id_is_said(model: str, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        resolve_model(model)


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="expected the checkpoint folder"):
        resolve_model(str(tmp_path / "model.safetensors"))


LOAD = """
import sys
from abliterate.errors import AbliterateError
from abliterate.prompts import load_prompts
for source in sys.argv[1:]:
    try:
        found = load_prompts(source)
        print(found.name, *found.prompts, *found.categories, sep="|")
    except AbliterateError as error:
        print(type(error).__name__, error)
"""


def loaded(cache: Path, url: str, *sources: str, **env: str) -> list[str]:
    """What `load_prompts` makes of each source, in a process whose hub client knows only the stand-in."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    settings = {"HF_ENDPOINT": url, "HF_HOME": str(cache), **env}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *sources], capture_output=True, text=True, check=False, env=clean | settings
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_one_file_of_a_data_set_is_fetched_alone_and_its_rows_chosen(tmp_path: Path) -> None:
    data, cache = tmp_path / "data", tmp_path / "cache"
    (data / "sub").mkdir(parents=True)
    (data / "bench-80k.csv").write_text("prompt,category\nlarge,c\n")
    (data / "bench-hard-1k.csv").write_text("prompt,category\nhard,d\n")
    (data / "README.md").write_text("about it")
    (data / "sub" / "x[1].csv").write_text("prompt,type,label\nkept,t,safe\ndropped,t,unsafe\n")
    sources = [
        "org/bench/bench-hard-1k.csv",
        "org/bench@v2/bench-hard-1k.csv",
        "org/bench/sub/x[1].csv:label=safe",
        "org/bench/sub/x[1].csv:label=save",
    ]
    wrong = ["org/bench/bench-hard.csv", "org/bench@v9/bench-hard-1k.csv", "org/other/bench-hard-1k.csv"]
    with serving(datasets__org__bench=data) as hub:
        *said, choice, file, revision, other = loaded(cache, hub.url, *sources, *wrong)
        assert said == [
            "org/bench/bench-hard-1k.csv|hard|d",
            "org/bench@v2/bench-hard-1k.csv|hard|d",
            "org/bench/sub/x[1].csv:label=safe|kept|t",
        ]
        assert choice.startswith(
            "PromptError org/bench/sub/x[1].csv: no row with label=save; the values there are safe"
        )
        assert file.endswith(
            "no file 'bench-hard.csv' in this data set; it has bench-80k.csv, bench-hard-1k.csv, sub/x[1].csv"
        )
        assert revision.startswith("HubError org/bench@v9") and "no revision 'v9'" in revision
        assert "no such dataset on the hub" in other
        assert not list(cache.rglob("bench-80k.csv")) and not [r for r in hub.requests if r.endswith("80k.csv")]
        asked = len(hub.requests)
        *kept, never = loaded(cache, hub.url, *sources[:3], "org/bench/bench-80k.csv", HF_HUB_OFFLINE="1")
        assert kept == said and never.startswith("HubError org/bench") and "could not be reached" in never
        assert len(hub.requests) == asked
