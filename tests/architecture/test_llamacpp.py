"""What a GGUF's tensors are to the residual stream, by llama.cpp's names."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from abliterate.architecture import kept, llamacpp
from abliterate.architecture.patterns import Architecture
from abliterate.checkpoint import Checkpoint, open_checkpoint
from abliterate.checkpoint.gguf_names import name_map
from abliterate.edit.plan import plan_edit
from abliterate.edit.writers import residual_writers
from abliterate.errors import UnsupportedError
from abliterate.inspection import inspect
from tests import gguf_files as g

EMBED = ("token_embd.weight", 1, None, False)
OUT = [("attn_output.weight", 0, None, False), ("ffn_down.weight", 0, None, False)]
EXPERT = ("ffn_down_exps.weight", 1, None, False)
BEHIND = [
    ("attn_output.weight", 0, "post_attention_norm.weight", False),
    ("ffn_down.weight", 0, "post_ffw_norm.weight", False),
]
Written = list[tuple[str, int, str | None, bool]]


def short(name: str | None) -> str | None:
    return name.split(".", 2)[2] if name is not None and name.startswith("blk.") else name


def opened(folder: Path, *arguments: Any, **stated: Any) -> Checkpoint:
    return open_checkpoint(g.tiny_gguf(folder / "x.gguf", *arguments, **stated))


@pytest.mark.parametrize(
    ("architecture", "blocks", "outside", "expected"),
    [
        ("llama", [g.LLAMA], {}, [EMBED, *OUT]),
        ("llama", [g.MIXTRAL], {}, [EMBED, OUT[0], EXPERT]),
        ("qwen2", [g.QWEN2], {}, [EMBED, *OUT]),
        ("gemma2", [g.GEMMA2], {}, [EMBED, *BEHIND]),
        ("olmo2", [g.OLMO2], {}, [EMBED, *BEHIND]),
        (
            "gpt2", [g.GPT2], {"position_embd.weight": (128, g.D_MODEL)},
            [
                EMBED, ("position_embd.weight", 1, None, False), OUT[0], ("attn_output.bias", 0, None, False),
                OUT[1], ("ffn_down.bias", 0, None, False),
            ],
        ),
        (
            "gpt-oss", [g.GPT_OSS], {},
            [EMBED, OUT[0], ("attn_output.bias", 0, None, False), EXPERT, ("ffn_down_exps.bias", 1, None, False)],
        ),
        (
            "deepseek2", [g.DEEPSEEK_DENSE, g.DEEPSEEK_MOE], {},
            [EMBED, *OUT, OUT[0], EXPERT, ("ffn_down_shexp.weight", 0, None, False)],
        ),
        (
            "bloom", [g.GPT2], {"token_embd_norm.weight": (g.D_MODEL,), "token_embd_norm.bias": (g.D_MODEL,)},
            [
                ("token_embd.weight", 1, "token_embd_norm.weight", True), ("token_embd_norm.bias", 0, None, False),
                OUT[0], ("attn_output.bias", 0, None, False), OUT[1], ("ffn_down.bias", 0, None, False),
            ],
        ),
    ],
)  # fmt: skip
def test_what_writes_has_its_axis_and_the_gain_behind_it(
    architecture: str, blocks: Any, outside: Any, expected: Written, tmp_path: Path
) -> None:
    found = residual_writers(opened(tmp_path, architecture, blocks, outside))
    assert [(short(w.tensor), w.axis, short(w.gain), w.centred) for w in found] == expected
    assert {w.gain_offset for w in found} == {0.0}  # conversion adds what the class adds
    tied = [w.tensor for w in found if w.tied_to]
    assert tied == ["token_embd.weight"]
    headed = opened(tmp_path, architecture, blocks, outside | {"output.weight": (g.VOCABULARY, g.D_MODEL)})
    assert not any(w.tied_to for w in residual_writers(headed))


def test_a_gain_adds_at_run_time_what_the_file_has_in_it(tmp_path: Path) -> None:
    sites = plan_edit(opened(tmp_path, "gemma2", [g.GEMMA2])).sites
    assert {(s.gain, s.gain_offset) for s in sites if s.gain} == {
        ("post_attention_layernorm.weight", 1.0), ("post_feedforward_layernorm.weight", 1.0)
    }  # fmt: skip


def test_biases_are_those_of_the_file(tmp_path: Path) -> None:
    block = g.LLAMA | {"attn_output.bias": (g.D_MODEL,)}
    found = residual_writers(opened(tmp_path, "llama", [block, block]))
    biases = [w for w in found if w.tensor.endswith("bias")]
    assert [(w.tensor, w.axis, w.layer, w.module) for w in biases] == [
        (f"blk.{layer}.attn_output.bias", 0, layer, "self_attn.o_proj") for layer in (0, 1)
    ]
    less = {name: shape for name, shape in g.GPT2.items() if not name.endswith("bias")}
    assert len(residual_writers(opened(tmp_path, "gpt2", [less], {"position_embd.weight": (9, g.D_MODEL)}))) == 4


def not_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experiments would take seconds, and end in the same refusal."""

    def refuse(*_: Any) -> Architecture:
        raise UnsupportedError("nothing was learned")

    monkeypatch.setattr(llamacpp, "learn", refuse)


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        ([g.LLAMA | {"ffn_down_exps.weight": (3, g.D_MODEL, g.D_FF)}], "ffn_down.weight"),
        ([g.GEMMA2], r"blk\.0\.post_attention_norm\.weight, blk\.0\.post_ffw_norm\.weight"),
        ([g.LLAMA | {"new_thing.weight": (g.D_MODEL, g.D_FF)}], r"blk\.0\.new_thing\.weight"),
        ([g.LLAMA, {n: s for n, s in g.LLAMA.items() if "down" not in n}], r"blk\.1\.ffn_down\.weight"),
    ],
)
def test_what_cannot_be_placed_is_named(
    blocks: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = opened(tmp_path, "llama", blocks)
    found = llamacpp.find(checkpoint)
    assert isinstance(found, Architecture)
    with pytest.raises(UnsupportedError, match=rf"x\.gguf.*{words}"):
        residual_writers(checkpoint, found)
    not_learned(monkeypatch)
    with pytest.raises(UnsupportedError, match=r"x\.gguf: nothing was learned"):
        residual_writers(checkpoint)


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ("internlm2", "transformers no class for it"),
        ("gemma3n", "mix several streams"),
        ("flux", "not known to the package gguf"),
    ],
)
def test_architectures_that_cannot_be_are_named(architecture: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=rf"x\.gguf: architecture '{architecture}'.*{words}"):
        residual_writers(opened(tmp_path, architecture))


def test_a_choice_that_the_file_states_counts(tmp_path: Path) -> None:
    kept_for = opened(tmp_path, "gptneox", [g.GPT2], gptneox__use_parallel_residual=True)
    assert isinstance(llamacpp.find(kept_for), Architecture)
    assert llamacpp.find(opened(tmp_path, "gptneox", [g.GPT2], gptneox__use_parallel_residual=False)) is None


def test_without_the_package_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = opened(tmp_path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(
        UnsupportedError, match=r"^GGUF files need the package gguf: pip install 'abliterate\[gguf\]' \S"
    ):
        residual_writers(checkpoint)


def test_all_that_is_kept_of_llamacpps_architectures_has_names_there(checkpoint_of: Callable[[str], Any]) -> None:
    named, without = [], []
    for architecture in gguf.MODEL_ARCH_NAMES.values():
        try:
            found = llamacpp.find(checkpoint_of(architecture))
        except UnsupportedError as error:
            assert "transformers no class" in str(error)
            without.append(architecture)
            continue
        if isinstance(found, Architecture):
            assert any(w.tensor == "token_embd.weight" for w in found.writers), architecture
            assert all(any(name.startswith("blk.") for name in kind) for kind in found.kinds), architecture
            assert all(w.gain is None or w.gain.offset == w.gain.included for w in found.writers)
            named.append(architecture)
    assert len(named) >= 60
    assert {"llama", "qwen3", "qwen3moe", "gemma3", "gpt-oss", "glm4", "phi3", "command-r", "smollm3"} <= {*named}
    assert {"plamo", "internlm2", "rwkv7", "bert", "t5"} <= {*without}


@pytest.fixture
def checkpoint_of() -> Callable[[str], Checkpoint]:
    """A checkpoint of nothing but an architecture."""

    def make(architecture: str) -> Checkpoint:
        return Checkpoint(Path("x"), "gguf", {}, {"model_type": architecture}, ("x.gguf",), (), (), "", {})

    return make


def test_classes_are_those_of_transformers(checkpoint_of: Callable[[str], Any]) -> None:
    for ours in llamacpp._CLASSES.values():
        assert ours in kept.model_types(), ours


def test_inspect_shows_a_file(tmp_path: Path) -> None:
    path = g.tiny_gguf(tmp_path / "x.gguf", "gemma2", [g.GEMMA2, g.GEMMA2], dtype=np.float16)
    found = inspect(str(path))
    assert (found.model_type, found.n_layers, found.d_model) == ("gemma2", 2, g.D_MODEL)
    assert {(w["role"], w["tensors"], w["axis"], w["dtype"], w["behind"]) for w in found.writers} == {
        ("embed", 1, 1, "F16", None),
        ("attention out", 2, 0, "F16", "post_attention_layernorm.weight"),
        ("MLP out", 2, 0, "F16", "post_feedforward_layernorm.weight"),
    }
    assert found.tied_head is not None


def test_one_architecture_leaves_the_names_of_others_alone() -> None:
    """Its own table is written into that of all by `gguf` itself: arctic and llama give one name two meanings."""
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    stored = "model.layers.0.post_attention_layernorm.weight"
    before = name_map(numbers["llama"], 1).get_name(stored, (".weight",))
    assert name_map(numbers["arctic"], 1).get_name(stored, (".weight",)) != before == "blk.0.ffn_norm.weight"
    assert name_map(numbers["llama"], 1).get_name(stored, (".weight",)) == before
