"""The page of a report: its sections, and hostile texts in its records."""

from __future__ import annotations

import base64
import json
import re
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.example_runs import SAMPLE_KEYS, rows_of, run_folder, write_run
from tests.pages import ATTACKS, Page
from tests.report.contrast import contrast
from trl_trustkl.cli import report as command
from trl_trustkl.report import render_report
from trl_trustkl.report.figures import FIGURES


def skeleton(page: Page) -> list[tuple[str, list[str]]]:
    """Every element with its attributes, without the data of the figures."""
    return [
        (
            tag,
            sorted(f"{k}={v}" for k, v in attributes.items() if not (v or "").startswith("data:image/svg+xml;base64,")),
        )
        for tag, attributes in page.elements
    ]


def hostile(folder: Path) -> Path:
    """A run with a hostile text in every field that holds text."""
    rows = rows_of(len(ATTACKS))
    for row, attack in zip(rows, ATTACKS, strict=True):
        row["binding"] = row["refused"] = attack
        row["trust"]["rule"] = row["anchor"]["estimator"] = row["anchor"]["placement"] = row["anchor"]["gradient"] = (
            attack
        )
        row["trust"]["ratio_quantiles"] = {attack: 1.0}
        row["seconds"] = {attack: 1.0}
        row[attack] = attack
    kept = [
        {**SAMPLE_KEYS, "update": 1 + i // 4, "prompt": a, "completion": a + b}
        for i, a in enumerate(ATTACKS)
        for b in "xy"
    ]
    return with_settings(write_run(folder, rows, kept), {a: {a: a, "nested": {a: [a]}} for a in [*ATTACKS, "options"]})


def with_settings(folder: Path, settings: Any) -> Path:
    (folder / "run_settings.json").write_text(json.dumps(settings))
    return folder


def test_nothing_of_a_record_becomes_an_element_or_an_attribute(tmp_path: Path) -> None:
    folder = hostile(tmp_path / '"><script>alert(1)<')  # "/" cannot be part of the name of a folder
    raw = render_report(folder, tmp_path / "hostile.html").read_text("utf-8")
    page = Page(raw)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "iframe", "svg", "object", "embed", "base", "link", "form", "a", "input"}
    names = {name for _, attributes in page.elements for name in attributes}
    assert not [name for name in names if name.startswith("on")] and "href" not in names and "style" not in names
    for _, attributes in page.elements:
        for name in ("src", "srcset"):
            assert (attributes.get(name) or "data:image/svg+xml;base64,").startswith("data:image/svg+xml;base64,")
        assert not any("alert" in (value or "") for value in attributes.values())
    assert not set(raw) & set("\x1b\x07\u202e\u2066\x00")
    assert "<script>alert(1)</script>" in page.text and "\\x1b[2J" in page.text and "\\u202etxt.exe" in page.text
    assert "{{ 7 * 7 }}" in page.text and "\\ud800" in page.text


def test_the_structure_of_the_page_does_not_depend_on_the_texts(tmp_path: Path) -> None:
    """Hostile records give the same elements and attributes as the same records with harmless words."""
    attacked = hostile(tmp_path / "a")
    harmless = tmp_path / "b"
    harmless.mkdir()
    words = (f"word {n}" for n in count())
    for name in ("bounds.jsonl", "completions.jsonl"):
        lines = [json.loads(line) for line in (attacked / name).read_text().splitlines()]
        for line in lines:
            for key, value in list(line.items()):
                if isinstance(value, str):
                    line[key] = next(words)
            if "trust" in line:
                line["trust"]["rule"] = line["anchor"]["estimator"] = line["anchor"]["placement"] = "word"
                line["anchor"]["gradient"] = "word"
        (harmless / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {next(words): "word" for _ in "ab"}
    with_settings(harmless, {next(words): {next(words): "word" for _ in "ab"} for _ in ATTACKS} | {"options": options})
    pages = [Page(render_report(folder).read_text("utf-8")) for folder in (attacked, harmless)]
    assert skeleton(pages[0]) == skeleton(pages[1])


def test_the_page_is_self_contained_and_says_so(ordinary: Path) -> None:
    page = Page(ordinary.read_text("utf-8"))
    (policy,) = [a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a]
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")
    assert not re.search(r"(?<!xmlns=\")https?://", page.text)
    images = [a for tag, a in page.elements if tag == "img"]
    assert len(images) == 2 * len(FIGURES) and all(image["alt"] for image in images)


def test_the_template_marks_nothing_as_safe() -> None:
    folder = Path(command.__file__).parent.parent / "report"
    for file in folder.rglob("*.*"):
        if file.suffix in (".py", ".html"):
            assert not re.search(r"\|\s*safe\b|\bMarkup\(|autoescape\s*(=\s*)?false", file.read_text("utf-8"), re.I), (
                file
            )


def test_sections_and_their_order(ordinary: Path) -> None:
    text = Page(ordinary.read_text("utf-8")).text
    places = [
        text.index(heading) for heading in ("Summary", "Findings", "Figures", "Completions", "Settings", "Every update")
    ]
    assert places == sorted(places) and text.index("Glossary") < places[0]
    assert "trust_max_kl=0.005" in text


def test_interventions_and_outcomes_are_told_apart(ordinary: Path) -> None:
    """Under Adam, a limit on the gradient's norm intervenes in updates that it does not shorten."""
    text = " ".join(Page(ordinary.read_text("utf-8")).text.split())
    assert "The share of an update in which a mechanism intervened" in text
    assert "What the same update would have done without one mechanism." in text
    assert "under an optimizer that rescales gradients itself, such as Adam, this hardly changes the update" in text
    assert not re.search("shortens the update|mechanism took|largest share", text)


def test_the_images_of_the_page_are_the_figure_files(ordinary: Path) -> None:
    page = Page(ordinary.read_text("utf-8"))
    sources = [a["src"] for tag, a in page.elements if tag == "img" and a["class"] == "light"]
    svgs = [base64.b64decode((source or "").partition(",")[2]).decode() for source in sources]
    assert svgs == [(ordinary.parent / "figures" / f"{name}.svg").read_text("utf-8") for name in FIGURES]


def test_the_glossary_is_closed_and_before_everything_else(ordinary: Path) -> None:
    page = Page(ordinary.read_text("utf-8"))
    tags = [tag for tag, _ in page.elements]
    place = tags.index("main") + 1
    assert tags[place : place + 3] == ["details", "summary", "dl"] and page.elements[place][1] == {}


def test_what_is_not_drawn_is_named(tmp_path: Path) -> None:
    text = Page(render_report(run_folder(tmp_path, 3, score=0.0)).read_text("utf-8")).text
    (said,) = re.findall("Not drawn, because .*", text)
    assert "The score; How far each update would have gone without a mechanism." in said


def sampled(prompts: list[str]) -> list[dict[str, Any]]:
    """A completion for each update, to one of the prompts."""
    return [
        {**SAMPLE_KEYS, "update": n, "prompt": prompt, "completion": f"answer {n}"}
        for n, prompt in enumerate(prompts, start=1)
    ]


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize(
    ("prompts", "says", "columns"),
    [
        (["Again?", "x", "Again?", "y", "Again?", "z", "Again?"], "The same prompts at the start, in the middle", 3),
        (["a", "b", "c"], "No prompt was recorded both", 3),
        (["a"], "One update recorded completions", 1),
    ],
)
def test_the_same_prompts_stand_side_by_side_if_they_recur(tmp_path, prompts, says, columns) -> None:
    page = Page(render_report(write_run(tmp_path, rows_of(7), sampled(prompts))).read_text("utf-8"))
    assert says in page.text and [a.get("class") for _, a in page.elements].count("moment") == columns
    assert page.text.count("Again?") == (1 if columns == 3 and "Again?" in prompts else 0)


@pytest.mark.usefixtures("without_figures")
def test_the_settings_that_the_run_wrote_are_in_full(tmp_path: Path) -> None:
    without = Page(render_report(run_folder(tmp_path)).read_text("utf-8")).text
    assert "the hardware are not on record" in without and "Every option" not in without
    options = {"seed": 7, "kl_controller": "adaptive", "report_to": ["none"], "gamma": 1.0}
    with_settings(tmp_path, {"versions": {"torch": "2.13.0"}, "hardware": {"GPU": "H100"}, "options": options})
    raw = render_report(tmp_path).read_text("utf-8")
    for row in ("versions torch 2.13.0", "hardware GPU H100", "run seed 7", "run kl_controller adaptive"):
        assert "<tr>" + "".join(f"<td>{cell}</td>" for cell in row.split()) + "</tr>" in raw
    assert "<td>report_to</td><td>[&#39;none&#39;]</td>" in raw and "not on record" not in raw.partition("Settings")[2]


STYLE = (Path(command.__file__).parent.parent / "report/templates/report.css").read_text("utf-8")


@pytest.mark.parametrize("mode", [0, 1])
def test_text_is_readable_in_light_and_dark_mode(mode: int) -> None:
    colors = dict(re.findall(r"--(\w+): (#\w{6})", STYLE.split("prefers-color-scheme: dark")[mode]))
    assert set(colors) == {"page", "card", "ink", "soft", "line", "accent", "warn"}
    for text in ("ink", "soft", "accent", "warn"):
        assert min(contrast(colors[text], colors["page"]), contrast(colors[text], colors["card"])) >= 4.5, text


def test_a_table_scrolls_within_the_width_of_a_phone(ordinary: Path) -> None:
    raw = ordinary.read_text("utf-8")
    assert 'name="viewport" content="width=device-width' in raw and ".scroll { overflow-x: auto; }" in STYLE
    assert raw.count("<table") == raw.count('<div class="scroll"><table') > 0
