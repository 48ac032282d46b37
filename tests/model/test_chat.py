"""The tokens after the request, and what comes before it, are the template's own, in the formats of many families."""

from __future__ import annotations

from typing import Any

import pytest

from abliterate.errors import UnsupportedError
from abliterate.model.chat import ChatFormat
from tests.templates import FAMILIES
from tests.tiny import tiny_tokenizer


def chat(family: str, **options: Any) -> ChatFormat:
    return ChatFormat(tiny_tokenizer(FAMILIES[family].template), **options)


def text(form: ChatFormat, ids: list[int]) -> str:
    found = form.tokenizer.decode(ids)
    assert isinstance(found, str)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tail_is_what_the_template_puts_behind_a_request(family: str) -> None:
    form = chat(family)
    assert text(form, form.tail()) == FAMILIES[family].tail
    (row,) = form.encode(["Name a river."])
    assert text(form, row).endswith("Name a river." + FAMILIES[family].tail)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_system_prompt_stands_before_the_request_or_is_refused(family: str) -> None:
    form = chat(family, system_prompt="Be brief.")
    if "raise_exception" in FAMILIES[family].template:
        with pytest.raises(UnsupportedError, match="--system-prompt"):
            form.render("Name a river.")
    else:
        rendered = form.render("Name a river.")
        assert -1 < rendered.index("Be brief.") < rendered.index("Name a river.")
        assert text(form, form.tail()) == FAMILIES[family].tail


@pytest.mark.parametrize("family", FAMILIES)
def test_the_switch_for_thinking_is_the_templates_or_refused(family: str) -> None:
    on, off = (chat(family, thinking=thinking) for thinking in ("on", "off"))
    if FAMILIES[family].on is None:
        with pytest.raises(UnsupportedError, match=r"--thinking on.*no such switch"):
            on.render("Name a river.")
    else:
        assert text(on, on.tail()) == FAMILIES[family].on and text(off, off.tail()) == FAMILIES[family].off
        assert on.render("Name a river.") != off.render("Name a river.")
