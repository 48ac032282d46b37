"""Architectures that no table names: their writers are found by experiment, and an edit of their files is exact."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from abliterate.architecture.learn import learn_config
from abliterate.architecture.patterns import Gain, WriterPattern, merge, regex
from abliterate.architecture.shrink import Form, shrink
from abliterate.architecture.stream import find_stream
from abliterate.architecture.twin import build_twin, random_ids
from abliterate.checkpoint import open_checkpoint
from abliterate.edit.apply import EditRecord, apply_edit
from abliterate.edit.plan import plan_edit
from abliterate.edit.writers import residual_writers
from abliterate.errors import UnsupportedError
from abliterate.model.hooks import ablate
from abliterate.model.load import ChatModel
from abliterate.model.sites import WriterSite

#: One of each layout: transposed, parallel, biased, learned positions, norm behind the embedding, experts in one
#: piece (both axis orders) and one by one, state space, gain behind the writer, scaled stream.
TYPES = ["gpt2", "gpt_neox", "falcon", "opt", "bloom", "gpt_oss", "mixtral", "mamba", "gemma2", "granite", "cohere"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny random checkpoints in float32."""
    found = {}
    for kind in TYPES:
        found[kind] = tmp_path_factory.mktemp(kind) / "model"
        build_twin(CONFIG_MAPPING[kind]()).float().save_pretrained(found[kind])
    return found


def direction(folder: Path) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """A random unit vector as wide as the stream of the checkpoint."""
    checkpoint = open_checkpoint(folder)
    writer = residual_writers(checkpoint)[0]
    r = np.random.default_rng(5).normal(size=checkpoint.tensors[writer.tensor].shape[writer.axis])
    return (r / np.linalg.norm(r)).astype(np.float32)


def edit(folder: Path, out: Path) -> list[EditRecord]:
    """Edit all writers of a checkpoint, from files to files."""
    out.mkdir()
    checkpoint = open_checkpoint(folder)
    return apply_edit(checkpoint, plan_edit(checkpoint), direction(folder), out)


def share(folder: Path, r: np.ndarray[tuple[int], np.dtype[np.float32]]) -> float:
    """The largest share of `r` in the stream of a real forward pass in plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        stream = find_stream(model)
        assert len(stream.states()) >= 4
        return stream.share(torch.from_numpy(r))


@pytest.mark.parametrize("kind", TYPES)
def test_the_edited_files_write_nothing_along_the_direction(
    kind: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = checkpoints[kind]
    records = edit(folder, tmp_path / "out")
    r = direction(folder)
    assert share(folder, r) > 1e-2
    assert share(tmp_path / "out", r) < 1e-5
    assert all(record.leak < 1e-5 and record.norm_removed > 0 for record in records)


@pytest.mark.parametrize("kind", TYPES)
def test_every_writer_is_needed(kind: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = checkpoints[kind]
    records = edit(folder, tmp_path / "out")
    r = direction(folder)
    kept = records[len(records) // 2].tensor
    (shard,) = (tmp_path / "out").glob("*.safetensors")
    tensors = load_file(shard)
    save_file(tensors | {kept: load_file(folder / shard.name)[kept]}, shard, {"format": "pt"})
    assert share(tmp_path / "out", r) > 1e-4


@pytest.mark.parametrize("kind", TYPES)
def test_hooks_compute_what_the_edited_files_compute(kind: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = checkpoints[kind]
    edit(folder, tmp_path / "out")
    base, edited = (
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for f in (folder, tmp_path / "out")
    )
    sites = plan_edit(open_checkpoint(folder)).sites
    rows = torch.from_numpy(direction(folder))[None].expand(2, -1)
    with torch.no_grad():
        before, after = base(random_ids(), use_cache=False).logits, edited(random_ids(), use_cache=False).logits
        with ablate(ChatModel(base, None), sites, rows):  # type: ignore[arg-type]  # nothing is chatted here
            hooked = base(random_ids(), use_cache=False).logits
    scale = before.abs().max()
    assert (hooked - after).abs().max() < 1e-4 * scale < (before - after).abs().max()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("bert", "normalise"),
        ("openai-gpt", "normalise"),
        ("opt-post-norm", "normalise"),
        ("doge", "gain"),
        ("xglm", "computed, not learned"),
        ("bart", "encoder and decoder"),
        ("mllama", "does not run on text alone"),
        ("blt", "several stacks"),
    ],
)
def test_streams_that_no_edit_can_clear_are_refused_by_name(kind: str, words: str) -> None:
    config = CONFIG_MAPPING["opt"](do_layer_norm_before=False) if kind == "opt-post-norm" else CONFIG_MAPPING[kind]()
    with pytest.raises(UnsupportedError, match=f"'{config.model_type}'.*{words}"):
        learn_config(config)


def test_experts_are_edited_on_their_own_axis_although_both_are_as_wide() -> None:
    config = CONFIG_MAPPING["gpt_oss"](hidden_size=96, intermediate_size=96)
    (experts,) = (w for w in learn_config(config).writers if w.tensor.endswith("experts.down_proj"))
    assert experts.axis == 2


def changed(folder: Path, out: Path, change: dict[str, torch.Tensor | None], **config: object) -> Path:
    """A copy of a checkpoint with tensors added or (None) taken away, in the place of an earlier one."""
    out.mkdir(exist_ok=True)
    tensors = load_file(folder / "model.safetensors") | change
    save_file({n: t for n, t in tensors.items() if t is not None}, out / "model.safetensors", {"format": "pt"})
    value = json.loads((folder / "config.json").read_text()) | config
    (out / "config.json").write_text(json.dumps(value))
    return out


def test_names_that_are_not_the_class_s_own_are_refused_or_left_alone(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder, block = checkpoints["mixtral"], "model.layers.1."
    names = load_file(folder / "model.safetensors")
    expert = f"{block}block_sparse_moe.experts.1.w2.weight"
    model = tmp_path / "model"  # one place for all, so that one configuration is learned once
    odd = changed(folder, model, {f"{block}adapter.up.weight": torch.zeros(4, 4)})
    with pytest.raises(UnsupportedError, match=r"layers\.1\.adapter\.up\.weight"):
        residual_writers(open_checkpoint(odd))
    every = {n: None for n in names if n.startswith(f"{block}block_sparse_moe.experts.") and n.endswith("w2.weight")}
    with pytest.raises(UnsupportedError, match=r"missing.*layers\.1\..*w2\.weight"):
        residual_writers(open_checkpoint(changed(folder, model, every)))
    config = json.loads((folder / "config.json").read_text())
    n = config["num_hidden_layers"]
    ahead = {f"model.layers.{n}.mtp.weight": torch.zeros(4, 4), "vision.patch.weight": torch.zeros(4, 4)}
    with_ahead = changed(folder, model, ahead)
    with pytest.raises(UnsupportedError, match=f"there are {n} layers"):
        residual_writers(open_checkpoint(with_ahead))
    (with_ahead / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    found = residual_writers(open_checkpoint(with_ahead))
    assert expert in {w.tensor for w in found} and not ahead.keys() & {w.tensor for w in found}


def test_what_is_set_apart_for_layers_that_a_twin_lacks_goes_with_them(tmp_path: Path) -> None:
    config = CONFIG_MAPPING["gemma4_text"]()
    assert max(map(int, config.to_dict()["per_layer_config"])) >= 8
    shrink(config, Form(2, tied_to_heads=False)).save_pretrained(tmp_path)
    small = AutoConfig.from_pretrained(tmp_path)
    layers = {int(layer) for layer in small.to_dict()["per_layer_config"]}
    assert layers and max(layers) < small.num_hidden_layers <= 8


def test_a_twin_has_every_kind_of_layer_that_the_class_makes() -> None:
    names = [n for n, _ in build_twin(CONFIG_MAPPING["jamba"]()).named_parameters()]
    assert all(any(part in n for n in names) for part in (".mamba.", ".self_attn.", ".experts.", ".feed_forward.down"))


def test_layers_that_share_their_weights_are_there_twice() -> None:
    learned = learn_config(CONFIG_MAPPING["zamba2"]())
    assert {w.role for w in learned.writers} == {"mixer out", "embed"}
    assert len(learned.kinds) == 2 and learned.n_layers == 54


def test_the_language_model_in_a_class_that_asks_for_images_is_looked_at_alone() -> None:
    learned = learn_config(CONFIG_MAPPING["blip-2"]())
    assert learned.prefix == "language_model.model.decoder.layers." and learned.leak < 1e-5
    assert learned.n_layers == CONFIG_MAPPING["blip-2"]().text_config.num_hidden_layers


def test_streams_that_are_mixed_but_never_turned_stay_free_of_the_direction() -> None:
    learned = learn_config(CONFIG_MAPPING["hy_v4"]())
    assert learned.leak < 1e-5 and {w.role for w in learned.writers} >= {"MLP out", "attention out", "embed"}


def test_experts_that_no_text_reaches_are_edited_as_the_others_are() -> None:
    def writer(tensor: str, role: str) -> WriterPattern:
        return WriterPattern(tensor, 0, role, 0, None, "experts", None)

    names = [f"model.layers.0.experts.{i}.down.weight" for i in range(4)] + ["model.layers.0.gate.weight"]
    found = merge("m", [writer(n, "expert out") for n in names[:2]], names, 1, 0.0)
    assert [w.tensor for w in found.writers] == ["model.layers.{layer}.experts.{n}.down.weight"]
    assert found.bystanders == ("model.layers.{layer}.gate.weight",)


def test_layers_of_one_kind_may_write_through_a_norm_where_others_do_not() -> None:
    norm = Gain("model.layers.1.norm.weight", "norm.weight", 0.0, centred=False)
    writers = [
        WriterPattern(f"model.layers.{i}.out.weight", 0, "MLP out", i, gain, "out", None)
        for i, gain in enumerate([None, norm])
    ]
    names = [w.tensor for w in writers] + ["model.layers.1.norm.weight"]
    plain, behind = merge("m", writers, names, 2, 0.0, ["a", "b", "b", "a"]).writers
    assert plain.gain is None and behind.gain is not None and behind.gain.tensor == "model.layers.{layer}.norm.weight"
    for layer, expected in enumerate([plain, behind, behind, plain]):
        (found,) = [p for p in (plain, behind) if regex(p.tensor).fullmatch(f"model.layers.{layer}.out.weight")]
        assert found == expected
    with pytest.raises(UnsupportedError, match="layers differ"):
        merge("m", writers, names, 2, 0.0, ["a", "a", "b", "b"])


def test_positions_that_all_rows_share_lose_each_row_s_own_direction() -> None:
    class Positions(torch.nn.Module):
        device = torch.device("cpu")

        def __init__(self) -> None:
            super().__init__()
            self.positions = torch.nn.Embedding(4, 8)

    torch.manual_seed(0)
    model, directions = Positions(), torch.nn.functional.normalize(torch.randn(2, 8), dim=-1)
    site = WriterSite(None, "positions")
    with torch.no_grad(), ablate(ChatModel(model, None), [site], directions):  # type: ignore[arg-type]
        written = model.positions(torch.arange(4))
    assert written.shape == (2, 4, 8)
    assert torch.einsum("btd,bd->bt", written, directions).abs().max() < 1e-6
    assert torch.einsum("btd,bd->bt", written, directions.flip(0)).abs().max() > 1e-2
