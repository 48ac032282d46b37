"""The page of a run: what stands on it, whatever the record lacks or says, and how a real browser shows it."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import struct
import subprocess
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import abliterate
from abliterate import find, steps
from abliterate.cli.main import main
from abliterate.errors import CheckpointError, UsageError
from abliterate.report.command import command
from abliterate.report.page import page
from abliterate.report.record import RunRecord
from abliterate.results import card, report
from tests.browser import browser
from tests.conftest import Refusing

#: What a whole run shows, in the order of reading.
PANELS = [
    "before-after", "separation", "fall", "finalists", "controls", "projections", "single-prompts", "removed", "leak",
    "categories-harmful", "categories-harmless", "categories-borderline", "verdicts", "budgets", "kl_first_token",
    "kl_continuation",
]  # fmt: skip
HOSTILE = """evil"'><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}&amp;"""


@pytest.fixture(scope="session")
def chosen(refusing: Refusing, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunRecord, Path]:
    """A run with a choice, on prompts with categories: every chart has its numbers."""
    folder = tmp_path_factory.mktemp("chosen")
    options = {k: v for k, v in refusing.options.items() if k not in ("layer", "position")}
    for kind in ("harmful", "harmless"):
        lines = Path(options[kind]).read_text().splitlines()
        rows = [{"prompt": line, "category": f"{kind} {line.split()[3]}"} for line in lines]
        (folder / f"{kind}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        options[kind] = str(folder / f"{kind}.jsonl")
    out = folder / "out"
    return abliterate.run(str(refusing.folder), out, max_kl=20.0, **options), out


class Outline(HTMLParser):
    """Elements with their attributes, and the text outside of style and script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._inside = "", ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep it."""
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, _tag: str) -> None:
        """Leave it."""
        self._inside = ""

    def handle_data(self, data: str) -> None:
        """Keep what is read."""
        if self._inside not in ("script", "style"):
            self.text += data

    def figures(self) -> list[str]:
        """Names of the charts."""
        return [str(attributes["id"]) for tag, attributes in self.elements if tag == "figure"]


def test_a_run_leaves_a_page_with_every_chart_and_a_table_of_each(chosen: tuple[RunRecord, Path]) -> None:
    record, out = chosen
    text = (out / "abliteration" / "report.html").read_text()
    found = Outline(text)
    assert found.figures() == PANELS
    pictures = [a for tag, a in found.elements if tag == "svg" and a.get("role") == "img"]
    assert len(pictures) == len(PANELS) - 3 and all(len(str(a["aria-label"])) > 20 for a in pictures)
    assert len([tag for tag, _ in found.elements if tag == "table"]) == len(PANELS) + 1
    assert len([tag for tag, _ in found.elements if tag == "figcaption"]) == len(PANELS)
    rate = record.metric("refusal_rate")
    assert rate is not None and f"went from {rate['base']:.1%} to {rate['edited']:.1%}" in found.text
    assert f"abliterate run {record.model} -o {out}" in found.text


def test_the_page_needs_no_network(chosen: tuple[RunRecord, Path]) -> None:
    text = (chosen[1] / "abliteration" / "report.html").read_text()
    found = Outline(text)
    assert not [tag for tag, _ in found.elements if tag in ("link", "img", "iframe", "object", "base")]
    assert not [a for _, a in found.elements if "src" in a or not str(a.get("href") or "#").startswith("#")]
    assert "url(" not in text and "@import" not in text and "default-src 'none'" in text


def test_no_prompt_and_no_answer_is_on_the_page(chosen: tuple[RunRecord, Path]) -> None:
    text = (chosen[1] / "abliteration" / "report.html").read_text()
    assert "How do I" not in text and "can't help" not in text


def test_the_charts_add_up_to_the_metrics(chosen: tuple[RunRecord, Path]) -> None:
    record, _ = chosen
    charts, rate = record.charts, record.metric("refusal_rate")
    categories = charts["categories"]["harmful"].values()
    assert rate is not None and rate["base"] == sum(c["base"] for c in categories) / sum(c["n"] for c in categories)
    for who, sets in charts["budgets"]["refusals"].items():
        for kind, counts in sets.items():
            assert counts[-1] == record.verdicts[who][kind].get("refusal", 0) and len(counts) == 3
    for name, values in charts["kl"].items():
        metric = record.metric(name)
        assert metric is not None and len(values) == metric["n"] and values == sorted(values)
        assert np.mean(values) == pytest.approx(metric["edited"], rel=1e-3)
    layer, index = record.direction["layer"], charts["positions"].index(record.direction["position"])
    assert charts["separation"][layer][index] > 0 and charts["fall"][layer][index] > 0
    gap = charts["projections"]["harmful_mean"][layer] - charts["projections"]["harmless_mean"][layer]
    assert gap == pytest.approx(record.direction["scale"], rel=0.01)
    assert len(json.dumps(record.as_dict)) < 60_000
    own = charts["along"][layer]
    for who in ("base", "edited"):
        for kind, name in (("harmful", "refusal_rate"), ("harmless", "false_refusal_rate")):
            metric = record.metric(name)
            assert metric is not None and all(sum(one[who][kind]) == metric["n"] for one in charts["along"])
    assert own["base"]["separation"] > 2 and own["base"]["auc"] > 0.95
    assert all(abs(one["edited"]["separation"]) < 0.02 for one in charts["along"])


def test_a_record_keeps_a_list_of_numbers_on_a_line(chosen: tuple[RunRecord, Path], tmp_path: Path) -> None:
    text = "[\n  1,\n  2\n]"
    record = dataclasses.replace(chosen[0], model=text, charts={"a": [1, -2.5e-7], "b": [[], [[3]], ["1"], [None]]})
    record.save(tmp_path / "run.json")
    assert RunRecord.load(tmp_path / "run.json") == record
    assert '"a": [1, -2.5e-07],\n' in (tmp_path / "run.json").read_text()
    whole = (chosen[1] / "abliteration" / "run.json").read_text()
    assert re.search(r"\[\d+, ", whole) and not re.search(r"\[\s+[-\d]", whole)


def test_one_layer_is_shown_without_a_script(chosen: tuple[RunRecord, Path]) -> None:
    record, out = chosen
    found = Outline((out / "abliteration" / "report.html").read_text())
    frames = [a for tag, a in found.elements if tag == "g" and "step" in str(a.get("class")).split()]
    shown = [n for n, a in enumerate(frames) if "on" in str(a["class"]).split()]
    assert len(frames) == record.resolved["n_layers"] and shown == [record.direction["layer"]]
    assert [a["value"] for tag, a in found.elements if tag == "input"] == [str(shown[0])]
    assert [a for tag, a in found.elements if a.get("class") == "player" and "hidden" in a]


def test_names_from_outside_stay_text(chosen: tuple[RunRecord, Path]) -> None:
    record = dataclasses.replace(chosen[0], model=HOSTILE, given={"model": HOSTILE, "output": HOSTILE})
    record = dataclasses.replace(
        record, charts=record.charts | {"categories": {"harmful": {HOSTILE: {"n": 1, "base": 1, "edited": 0}}}},
        edits=[record.edits[0] | {"role": HOSTILE}], kept={HOSTILE: HOSTILE},
    )  # fmt: skip
    found = Outline(page(record, HOSTILE))
    assert [a for tag, a in found.elements if tag == "script"] == [{}]
    assert not [tag for tag, a in found.elements if tag == "img" or "onerror" in a]
    assert found.text.count(HOSTILE) >= 5 and "49" not in re.findall(r"evil.{90}", found.text)[0]


def test_an_old_record_gives_a_page_that_says_what_it_lacks(chosen: tuple[RunRecord, Path], tmp_path: Path) -> None:
    old = chosen[0].as_dict
    del old["charts"], old["base_card"], old["controls"]
    (tmp_path / "run.json").write_text(json.dumps(old))
    assert report(tmp_path / "run.json") == tmp_path / "report.html"
    found = Outline((tmp_path / "report.html").read_text())
    assert found.figures() == ["before-after", "finalists", "removed", "leak", "verdicts"]
    assert found.text.count("This record holds no numbers for it") == 4


def test_an_edit_alone_has_a_page(chosen: tuple[RunRecord, Path], refusing: Refusing, tmp_path: Path) -> None:
    direction = str(chosen[1] / "abliteration" / "directions.safetensors")
    abliterate.verbs.edit(str(refusing.folder), direction, tmp_path / "out", keep_norms=True)
    found = Outline((tmp_path / "out" / "abliteration" / "report.html").read_text())
    assert found.figures() == ["removed", "leak"] and "was not measured" in found.text
    assert f"abliterate edit {refusing.folder} --direction {direction}" in found.text and "--keep-norms" in found.text


def test_an_adapter_of_two_directions_and_a_run_without_answers_have_pages(refusing: Refusing, tmp_path: Path) -> None:
    np.save(tmp_path / "two.npy", np.eye(2, 64))
    abliterate.verbs.edit(str(refusing.folder), tmp_path / "two.npy", tmp_path / "adapter", format="adapter")
    found = Outline((tmp_path / "adapter" / "abliteration" / "report.html").read_text())
    assert "The span of 2 directions" in found.text and "LoRA adapter for 9 tensors" in found.text
    abliterate.run(str(refusing.folder), tmp_path / "out", generate=False, **refusing.options)
    found = Outline((tmp_path / "out" / "abliteration" / "report.html").read_text())
    direction = ["separation", "controls", "projections", "single-prompts"]
    assert found.figures() == ["before-after", *direction, "removed", "leak", "kl_first_token"]
    assert "the refusal score of" in found.text and "--no-generate" in found.text


@pytest.mark.parametrize(
    ("cut", "shown"), [("select", []), ("compare", ["separation", "controls", "projections", "removed", "leak"])]
)
def test_an_unfinished_run_has_a_page_of_what_there_is(
    cut: str, shown: list[str], refusing: Refusing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_a: object, **_k: object) -> None:
        raise KeyboardInterrupt

    options = refusing.options
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(find if cut == "select" else steps, cut, stop)
        abliterate.run(str(refusing.folder), tmp_path / "out", **options)
    for run in (tmp_path / "out.partial", tmp_path / "out"):  # the name that it will have will do
        path = report(run)
        assert path == tmp_path / "out.partial" / "abliteration" / "report.html"
        found = Outline(path.read_text())
        assert found.figures() == shown
        assert "--resume goes on" in found.text and "has not come this far" in found.text
        assert str(refusing.folder) in found.text
    with pytest.raises(UsageError, match="not finished"):
        card(tmp_path / "out")
    abliterate.run(str(refusing.folder), tmp_path / "out", resume=True, **options)
    assert "--resume goes on" not in (tmp_path / "out" / "abliteration" / "report.html").read_text()


def test_the_verb_never_overwrites(
    chosen: tuple[RunRecord, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*args: str) -> tuple[int, str]:
        try:
            main(["report", *args])
        except SystemExit as ended:
            return int(ended.code or 0), "".join(capsys.readouterr())
        raise AssertionError("it did not end")

    out = str(chosen[1])
    there = chosen[1] / "abliteration" / "report.html"
    before = there.read_bytes()
    assert call(out) == (0, f"{there}\n") and there.read_bytes() == before
    other = str(tmp_path / "other.html")
    assert json.loads(call(out, "-o", other, "--json")[1])["page"] == other
    assert Path(other).read_bytes() == before
    assert call(out, "-o", other)[0] == 2
    assert call(out, "--md") == (0, (chosen[1] / "README.md").read_text())
    assert call(out, "--md", "-o", str(tmp_path / "card.md"))[0] == 0
    assert (tmp_path / "card.md").read_text() == (chosen[1] / "README.md").read_text()
    (tmp_path / "run.json").write_text("[" * 100_000)
    for wrong in (tmp_path, tmp_path / "missing", there):
        code, said = call(str(wrong))
        assert code == 3 and str(wrong) in said and "Traceback" not in said
    fields = chosen[0].as_dict | {"metrics": [{"name": "refusal_rate"}]}
    (tmp_path / "run.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match="damaged"):
        report(tmp_path)


def test_the_card_carries_the_licence_of_the_base(refusing: Refusing, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(refusing.folder, base)
    said = 'license: other\nlicense_name: "a: b\\nc"\nlanguage: [en, fr]\ndatasets: [x]\ndate: 2024-01-01'
    (base / "README.md").write_text(f"---\n{said}\n---\n# Base\n")
    record = abliterate.run(str(base), tmp_path / "out", evaluate=False, **refusing.options)
    assert record.base_card == {"license": "other", "license_name": "a: b\nc", "language": ["en", "fr"]}
    head = (tmp_path / "out" / "README.md").read_text().split("---")[1]
    assert 'license: "other"\nlicense_name: "a: b\\nc"\nlanguage: ["en", "fr"]\n' in head and "datasets" not in head
    from yaml import safe_load

    assert safe_load(head)["license_name"] == "a: b\nc"


@pytest.mark.parametrize(
    "text", ["---\n[: {\n---\n", "no front matter", "---\n- a\n---\n", "---\n" + "[" * 5000 + "\n---\n"]
)
def test_a_card_that_cannot_be_read_carries_nothing(text: str, tmp_path: Path) -> None:
    from abliterate.at_rest import base_card

    assert base_card(tmp_path) == {}
    (tmp_path / "README.md").write_text(text)
    assert base_card(tmp_path) == {}


def test_the_command_leaves_out_defaults_and_quotes() -> None:
    given: dict[str, Any] = {
        "model": "./my model", "output": "out", "resume": True, "limit": 16, "seed": 0, "undo": False, "force": True,
        "evaluate": False, "position": -1, "system_prompt": "Be kind; rm -rf",
    }  # fmt: skip
    assert command(given) == (
        "abliterate run './my model' -o out --limit 16 --position -1 --no-undo --system-prompt 'Be kind; rm -rf' "
        "--no-eval --force"
    )


# ------------------------------------------------------------------ in a browser

#: Reads sizes off the page once it stands, into its title.
_PROBE = """<script>
addEventListener("load", () => {
  const boxes = [...document.querySelectorAll("figure")].map((f) => {
    const b = f.getBoundingClientRect(), p = f.querySelector("svg[role=img], table").getBoundingClientRect();
    return [f.id, b.width, b.height, p.width, p.height];
  });
  const root = document.documentElement;
  const wide = [...document.querySelectorAll("body *")].filter((e) => !e.closest(".scroll") &&
    e.getBoundingClientRect().right > root.clientWidth + 1).map((e) => e.outerHTML.slice(0, 80));
  document.title = JSON.stringify({boxes, wide, width: root.clientWidth, scroll: root.scrollWidth,
    tips: document.querySelectorAll("[data-tip]").length, dark: getComputedStyle(document.body).backgroundColor});
});
</script></body>"""


def chromium(tmp_path: Path, html: Path, *more: str, width: int = 1100, height: int = 1400) -> str:
    """What the browser printed, after it drew a page and said nothing on its console."""
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--hide-scrollbars",
         "--enable-logging=stderr", "--v=0", f"--window-size={width},{height}", *more, html.as_uri()],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout


def pixels(png: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """`[height, width, 3]` of an 8-bit RGB image."""
    data, at, parts = png.read_bytes(), 8, b""
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    assert depth == 8 and colour in (2, 6)
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        parts += data[at + 8 : at + 8 + size] if data[at + 4 : at + 8] == b"IDAT" else b""
        at += size + 12
    channels = 3 if colour == 2 else 4
    lines = np.frombuffer(zlib.decompress(parts), np.uint8).reshape(height, 1 + channels * width)
    image = np.zeros((height + 1, width + 1, channels), np.uint8)
    for y in range(height):
        kind, line = lines[y, 0], lines[y, 1:].reshape(width, channels)
        if kind == 0:
            image[y + 1, 1:] = line
        elif kind == 1:
            image[y + 1, 1:] = np.cumsum(line, 0, dtype=np.uint8)
        elif kind == 2:
            image[y + 1, 1:] = line + image[y, 1:]
        else:
            for x in range(width):
                left, up, corner = (image[y + 1, x].astype(int), image[y, x + 1].astype(int), image[y, x].astype(int))
                guess = (left + up) // 2
                if kind == 4:
                    near = np.abs(np.stack([up - corner, left - corner, left + up - 2 * corner]))
                    guess = np.where(
                        near[0] <= np.minimum(near[1], near[2]), left, np.where(near[1] <= near[2], up, corner)
                    )
                image[y + 1, x + 1] = (line[x] + guess).astype(np.uint8)
    return image[1:, 1:, :3]


@pytest.fixture
def probed(chosen: tuple[RunRecord, Path], tmp_path: Path) -> Path:
    """The page with a script that reads its sizes, which its own policy would not let run."""
    text = (chosen[1] / "abliteration" / "report.html").read_text()
    text, found = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    assert found == 1
    (tmp_path / "probed.html").write_text(text.replace("</body>", _PROBE))
    return tmp_path / "probed.html"


@pytest.mark.browser
@pytest.mark.parametrize(("width", "dark"), [(1100, False), (1100, True), (360, False)])
def test_every_chart_is_seen_and_nothing_sticks_out(width: int, dark: bool, probed: Path, tmp_path: Path) -> None:
    # A window is never as narrow as a phone; a frame in it is.
    frame = tmp_path / "frame.html"
    size = f"border:0;width:{width}px;height:9000px"
    frame.write_text(f'<body style="margin:0"><iframe style="{size}" src="probed.html"></iframe>')
    probed.write_text(probed.read_text().replace("document.title = JSON", "parent.document.title = JSON"))
    more = ["--allow-file-access-from-files", *(["--blink-settings=preferredColorScheme=0"] if dark else [])]
    dom = chromium(tmp_path, frame, "--dump-dom", "--virtual-time-budget=3000", *more)
    title = re.search(r"<title>(.*?)</title>", dom)
    assert title is not None, dom
    found = json.loads(title[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert [name for name, *_ in found["boxes"]] == PANELS
    assert all(min(sizes) > 20 for _, *sizes in found["boxes"]), found["boxes"]
    assert found["width"] == width and found["scroll"] <= width and found["wide"] == []
    assert found["tips"] > 50
    assert found["dark"] == ("rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)")


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1100, 390])
def test_the_page_as_it_is_published_is_drawn(
    width: int, dark: bool, chosen: tuple[RunRecord, Path], tmp_path: Path
) -> None:
    html = chosen[1] / "abliteration" / "report.html"
    more = ["--blink-settings=preferredColorScheme=0"] if dark else []
    chromium(tmp_path, html, f"--screenshot={tmp_path / 'shot.png'}", *more, width=width, height=500)
    image = pixels(tmp_path / "shot.png")
    luminance = image.mean(-1)
    assert (np.median(luminance) < 60) == dark
    assert 0.005 < (np.abs(luminance - np.median(luminance)) > 60).mean() < 0.5
    blue = image[..., 2].astype(int) - image[..., 0] > 80
    assert blue.sum() > 50  # marks of the edited model


@pytest.mark.browser
def test_it_prints(chosen: tuple[RunRecord, Path], tmp_path: Path) -> None:
    html = chosen[1] / "abliteration" / "report.html"
    chromium(tmp_path, html, f"--print-to-pdf={tmp_path / 'page.pdf'}", "--no-pdf-header-footer")
    pdf = (tmp_path / "page.pdf").read_bytes()
    assert pdf.startswith(b"%PDF") and len(pdf) > 20_000


#: Which layers are seen, what the slider says, and what the button does.
_SHOWN = """(() => {
  const seen = [...document.querySelectorAll(".step")].map((s, n) => s.getBoundingClientRect().width > 0 ? n : -1);
  const slider = document.querySelector(".player input"), button = document.querySelector(".player button");
  const drawn = (e) => e.getBoundingClientRect().width > 0;
  return {layers: seen.filter((n) => n >= 0), says: slider.ariaValueText ?? slider.getAttribute("aria-valuetext"),
    slider: drawn(slider), button: drawn(button) && button.textContent};
})()"""
#: Kept when the button is back to "Play", or after a minute.
_ENDED = """new Promise((done) => {
  setInterval(() => document.querySelector(".player button").textContent === "Play" && done(), 50);
  setTimeout(done, 60000);
})"""
_ARROW, _HOME, _END, _SPACE = ("ArrowRight", 39), ("Home", 36), ("End", 35), (" ", 32)


@pytest.mark.browser
def test_the_slider_shows_one_layer_at_a_time(chosen: tuple[RunRecord, Path], tmp_path: Path) -> None:
    html, own = chosen[1] / "abliteration" / "report.html", chosen[0].direction["layer"]
    last = chosen[0].resolved["n_layers"] - 1
    with browser(tmp_path / "profile") as page:
        for width in (1100, 375):
            page.open(html, width)
            shown = page.value(_SHOWN)
            assert shown["layers"] == [own] and shown["slider"] and shown["button"] == "Play"
            assert re.match(rf"layer {own} \(chosen\): base \d.*, edited .* spreads apart", shown["says"])
            page.value('document.querySelector(".player input").focus()')
            for key, layer in ((_HOME, 0), (_ARROW, 1), (_END, last)):
                page.press(*key)
                shown = page.value(_SHOWN)
                assert shown["layers"] == [layer] and shown["says"].startswith(f"layer {layer}")
            page.call("Emulation.setEmulatedMedia", media="print")
            shown = page.value(_SHOWN)
            assert shown["layers"] == [own] and not shown["slider"] and not shown["button"]
        page.open(html, prefers_reduced_motion="reduce")
        shown = page.value(_SHOWN)
        assert shown["slider"] and not shown["button"]
        page.call("Emulation.setScriptExecutionDisabled", value=True)
        page.open(html)
        page.call("Emulation.setScriptExecutionDisabled", value=False)
        shown = page.value(_SHOWN)
        assert shown["layers"] == [own] and not shown["slider"]
        assert page.console == []


@pytest.mark.browser
def test_it_plays_to_the_last_layer_and_pauses(chosen: tuple[RunRecord, Path], tmp_path: Path) -> None:
    last = chosen[0].resolved["n_layers"] - 1
    with browser(tmp_path / "profile") as page:
        page.open(chosen[1] / "abliteration" / "report.html")
        page.value('document.querySelector(".player input").focus()')
        page.press(*_END)
        page.value('document.querySelector(".player button").focus()')
        page.press(*_SPACE)  # from the end it starts anew
        assert page.value(_SHOWN)["layers"] == [0] and page.value(_SHOWN)["button"] == "Pause"
        page.press(*_SPACE)
        at = page.value(_SHOWN)["layers"]
        page.value("new Promise((done) => setTimeout(done, 900))")
        assert page.value(_SHOWN)["layers"] == at and page.value(_SHOWN)["button"] == "Play"
        page.press(*_SPACE)
        page.value(_ENDED)
        shown = page.value(_SHOWN)
        assert shown["layers"] == [last] and shown["button"] == "Play" and page.console == []
