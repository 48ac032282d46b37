"""Chat templates in the formats of well-known families, written for these tests: what surrounds a request in each."""

# ruff: noqa: E501 - templates are what they are

from __future__ import annotations

from typing import NamedTuple


class Family(NamedTuple):
    """A template, what comes after the request, and that with thinking on and off where there is a switch."""

    template: str
    tail: str
    on: str | None = None
    off: str | None = None


def turns(open_turn: str, close_turn: str, opening: str, begin: str = "{{ bos_token }}") -> str:
    """A template whose turns all look alike."""
    return (
        f"{begin}{{% for m in messages %}}{open_turn}{{{{ m['content'] }}}}{close_turn}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{opening}{{% endif %}}"
    )


_SWITCH = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
_NAMED = "{{ 'Assistant' if m['role'] == 'assistant' else 'User' }}"

FAMILIES: dict[str, Family] = {
    "chatml": Family(
        turns("<|im_start|>{{ m['role'] }}\n", "<|im_end|>\n", "<|im_start|>assistant\n", ""),
        "<|im_end|>\n<|im_start|>assistant\n",
    ),
    "llama3": Family(
        turns(
            "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n", "<|eot_id|>",
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "llama2": Family(
        "{% for m in messages %}{% if m['role'] == 'system' %}{% set before = '<<SYS>>\n' + m['content'] + '\n<</SYS>>\n\n' %}"
        "{{ bos_token }}[INST] {{ before }}{% else %}{% if loop.first %}{{ bos_token }}[INST] {% endif %}"
        "{{ m['content'] }} [/INST]{% endif %}{% endfor %}",
        " [/INST]",
    ),
    "mistral": Family(
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}[SYSTEM_PROMPT]{{ m['content'] }}[/SYSTEM_PROMPT]"
        "{% else %}[INST]{{ m['content'] }}[/INST]{% endif %}{% endfor %}",
        "[/INST]",
    ),
    "gemma": Family(
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        "<end_of_turn>\n<start_of_turn>model\n",
    ),
    "phi3": Family(
        turns("<|{{ m['role'] }}|>\n", "<|end|>\n", "<|assistant|>\n"), "<|end|>\n<|assistant|>\n"
    ),
    "zephyr": Family(turns("<|{{ m['role'] }}|>\n", "{{ eos_token }}\n", "<|assistant|>\n", ""), "</s>\n<|assistant|>\n"),
    "command-r": Family(
        turns(
            "<|START_OF_TURN_TOKEN|><|{{ m['role'] | upper }}_TOKEN|>", "<|END_OF_TURN_TOKEN|>",
            "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        ),
        "<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    ),
    "olmo2": Family(turns("<|{{ m['role'] }}|>\n", "\n", "<|assistant|>\n"), "\n<|assistant|>\n"),
    "vicuna": Family(turns(f"{_NAMED}: ", "\n\n", "Assistant:"), "\n\nAssistant:"),
    "qwen3": Family(
        turns("<|im_start|>{{ m['role'] }}\n", "<|im_end|>\n", "<|im_start|>assistant\n" + _SWITCH, ""),
        "<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    "deepseek-v3.1": Family(
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}{% else %}<|User|>"
        "{{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|Assistant|>"
        "{% if thinking %}<think>{% else %}</think>{% endif %}{% endif %}",
        "<|Assistant|></think>",
        "<|Assistant|><think>",
        "<|Assistant|></think>",
    ),
    "granite": Family(
        "{% if thinking %}<|role|>system<|/role|>Think first.<|eot|>\n{% endif %}"
        + turns("<|role|>{{ m['role'] }}<|/role|>", "<|eot|>\n", "<|role|>assistant<|/role|>", ""),
        "<|eot|>\n<|role|>assistant<|/role|>",
        "<|eot|>\n<|role|>assistant<|/role|>",
        "<|eot|>\n<|role|>assistant<|/role|>",
    ),
}  # fmt: skip
