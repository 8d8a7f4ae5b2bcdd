"""The report: records from anywhere read without a crash, no injection into the page, figures of bounded size."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from argparse import ArgumentParser
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.test_findings import HEALTHY, completions_of, rows_of, write_run
from trl_trustkl import report
from trl_trustkl.cli import report as command
from trl_trustkl.errors import DataError
from trl_trustkl.report import MissingPackageError, read_run, render_report
from trl_trustkl.report.figures import FIGURES, draw, envelope
from trl_trustkl.report.tables import ROWS, moments, updates
from trl_trustkl.report.text import number, percent, visible

SAMPLE_KEYS = {"update": 1, "prompt": "p", "completion": "c", "score": 0.5, "ref_logp": -50.0}


def run_folder(folder: Path, count: int = 12, **changes: Any) -> Path:
    rows = rows_of(count, **changes)
    return write_run(folder, rows, completions_of(rows))


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of an ordinary run, for the tests that only look at it."""
    return render_report(run_folder(tmp_path_factory.mktemp("ordinary"), trust__max_ratio=99.0))


# -- reading -----------------------------------------------------------------------------------------------------------


def with_line(folder: Path, line: bytes, file: str = "bounds.jsonl") -> Path:
    """A run whose third line is `line`."""
    write_run(folder, rows_of(4), [SAMPLE_KEYS] * 4)
    lines = (folder / file).read_bytes().splitlines(keepends=True)
    (folder / file).write_bytes(b"".join([*lines[:2], line, *lines[2:]]))
    return folder


def changed(key: str, value: Any) -> bytes:
    (row,) = rows_of(1, **{key.replace(".", "__"): value})
    return json.dumps(row).encode() + b"\n"


def without(key: str) -> bytes:
    row = json.loads(json.dumps(HEALTHY))
    *path, last = key.split(".")
    place = row
    for step in path:
        place = place[step]
    del place[last]
    return json.dumps(row).encode() + b"\n"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{broken\n", "not a JSON record"),
        (b"[1, 2]\n", "must be a JSON object, got list"),
        (b"\xff\xfe\x00\n", "not a JSON record ('utf-8' codec"),
        (without("trust.kl"), "the key `trust.kl` is missing; expected a number"),
        (without("anchor"), "the key `anchor` is missing; expected an object"),
        (changed("trust.kl", "0.1"), "`trust.kl` must be a number, got '0.1'"),
        (changed("trust.kl", True), "`trust.kl` must be a number, got True"),
        (changed("trust.kl", 10**400), "`trust.kl` must be a number below 1e308, got an integer of more than 20"),
        (changed("trust", [1]), "`trust` must be an object with rule, low"),
        (changed("trust.ratio_quantiles", {"0.5": "x"}), "`trust.ratio_quantiles.'0.5'` must be a number, got 'x'"),
        (changed("trust.stopped", "no"), "`trust.stopped` must be true or false, got 'no'"),
        (changed("update", 1.5), "`update` must be an integer >= 0, got 1.5"),
        (changed("update", 10**30), "`update` must be an integer >= 0"),
        (changed("binding", {"a": 1}), "`binding` must be text, got an object of 1"),
        (changed("binding", None), "`binding` must be text, got None"),
        (changed("refused", 3), "`refused` must be text, got 3"),
        (changed("trust.rule", "\x1b[31m" * 10**6)[:-2] + b"\n", "not a JSON record"),
        (b'{"update": "' + b"x" * 10_000_000 + b'"}\n', "`update` must be an integer >= 0, got 'xxx"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_broken_line_is_named_with_what_was_expected(tmp_path: Path, line: bytes, said: str) -> None:
    with pytest.raises(DataError) as raised:
        read_run(with_line(tmp_path, line))
    message = str(raised.value)
    assert f"{tmp_path / 'bounds.jsonl'}, line 3: " in message and said in message
    assert len(message) < 600 and "\x1b" not in message


def test_nesting_without_end_is_an_error_not_a_crash(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nested too deeply|not a JSON record"):
        read_run(with_line(tmp_path, b'{"a":' + b"[" * 1_000_000 + b"\n"))


def test_a_broken_completion_is_named_too(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"completions.jsonl, line 3: the key `completion` is missing; expected text"):
        read_run(with_line(tmp_path, b'{"update": 1, "prompt": "p"}\n', "completions.jsonl"))


def test_a_last_line_cut_short_is_left_out_and_told(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    content = (folder / "bounds.jsonl").read_bytes()
    (folder / "bounds.jsonl").write_bytes(content[:-100])
    run = read_run(folder)
    assert len(run.records) == 11
    assert run.notes == ["bounds.jsonl: the last line, 12, is cut short and was left out."]


def test_numbers_that_are_not_finite_are_missing_and_told(tmp_path: Path) -> None:
    folder = write_run(tmp_path, rows_of(4, trust__kl=float("inf"), score=float("nan")))
    run = read_run(folder)
    assert np.isnan(run.records[0].trust.kl) and run.records[0].score is None
    assert (
        len(run.notes) == 2 and "`score` is not finite (NaN or Infinity) in 4 line(s), first in line 1" in run.notes[0]
    )
    assert render_report(folder).exists()


def test_unknown_keys_blank_lines_and_optional_keys_are_no_error(tmp_path: Path) -> None:
    rows = rows_of(3, trust__later="x", later={"deep": [1]})
    del rows[0]["trust"]["limit"]
    write_run(tmp_path, rows)
    (tmp_path / "bounds.jsonl").write_bytes(b"\n\n" + (tmp_path / "bounds.jsonl").read_bytes())
    run = read_run(tmp_path)
    assert len(run.records) == 3 and run.records[0].trust.limit is None and run.notes == [] and run.completions == []


def test_a_record_out_of_order_is_sorted_and_told(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, [*rows_of(3), *rows_of(2, score=0.9)]))
    assert [record.update for record in run.records] == [1, 2, 3] and run.records[0].score == 0.9
    assert "not in order" in run.notes[0]


def test_no_records(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no records at"):
        read_run(tmp_path)
    (tmp_path / "bounds.jsonl").write_text("")
    with pytest.raises(DataError, match="holds no finished update"):
        read_run(tmp_path)


def test_records_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, mode: str) -> Any:
        raise PermissionError(13, "Permission denied")

    folder = run_folder(tmp_path)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"bounds.jsonl cannot be read: Permission denied"):
        read_run(folder)


def test_conversations_are_read_as_text(tmp_path: Path) -> None:
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": [{"text": "ü"}]}]
    rows = [{**SAMPLE_KEYS, "prompt": talk}, {**SAMPLE_KEYS, "prompt": [{"role": "user", "content": "hello"}]}]
    run = read_run(write_run(tmp_path, rows_of(1), rows))
    assert [row.prompt for row in run.completions] == ['system: s\nuser: [{"text": "ü"}]', "hello"]


# -- text --------------------------------------------------------------------------------------------------------------


def test_characters_that_act_are_shown_instead() -> None:
    assert visible("a\x1b[31mb\x00\x9b") == "a\\x1b[31mb\\x00\\x9b"
    assert visible("\u202eabc\u2066\u200f\ufeff") == "\\u202eabc\\u2066\\u200f\\ufeff"
    assert visible("\ud800 \U000e0041") == "\\ud800 \\U000e0041"
    assert visible("line\r\nline\ttab\u00a0nbsp \u2028") == "line\nline tab nbsp \\u2028"
    for plain in ("Grüße 你好 שלום", "👩\u200d🚀", "می\u200cخواهم", ""):
        assert visible(plain) == plain


def test_numbers_are_short_and_missing_ones_a_dash() -> None:
    assert [number(x) for x in (0.05, 1.0, 12345.6, 0.0, 1234567, 1e-5, None, float("nan"), float("inf"))] == [
        "0.05", "1", "12,346", "0", "1.23e+06", "1.00e-05", "–", "–", "–",
    ]  # fmt: skip
    assert [percent(x) for x in (0.5, 0.0001, 0.0, None)] == ["50 %", "<1 %", "0 %", "–"]


# -- the page ----------------------------------------------------------------------------------------------------------

ATTACKS = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg/onload=alert(1)>",
    "</p></div></style></title><iframe srcdoc='x'>",
    "javascript:alert(1)",
    '<a href="javascript:alert(1)">x</a>',
    "{{ 7 * 7 }}{% raw %}",
    "]]><!-- --><base href=//evil>",
    "\x1b[2J\x1b]0;owned\x07",
    "\u202etxt.exe\u2066",
    "\ud800",
    "&lt;script&gt;&#x3c;script>",
    "$\\frac{$ \\input{x}",
]


class Page(HTMLParser):
    """Elements, attributes and text of a page, as a browser's parser would see them."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def skeleton(page: Page) -> list[tuple[str, list[str]]]:
    """Every element with its attributes, data of the figures and texts about them left out."""
    return [
        (
            tag,
            sorted(f"{k}={v}" for k, v in attributes.items() if not (v or "").startswith("data:image/svg+xml;base64,")),
        )
        for tag, attributes in page.elements
    ]


def hostile(folder: Path) -> Path:
    """A run with an attack in every place that takes text."""
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
    return write_run(folder, rows, kept)


def test_nothing_of_a_record_becomes_an_element_or_an_attribute(tmp_path: Path) -> None:
    folder = hostile(tmp_path / '"><script>alert(1)<')  # "/" cannot be part of a folder's name
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
    """The same records with harmless words give the same elements with the same attributes, one by one."""
    attacked = hostile(tmp_path / "a")
    harmless = tmp_path / "b"
    harmless.mkdir()
    for name in ("bounds.jsonl", "completions.jsonl"):
        lines = [json.loads(line) for line in (attacked / name).read_text().splitlines()]
        for line in lines:
            for key, value in list(line.items()):
                if isinstance(value, str):
                    line[key] = "word"
            if "trust" in line:
                line["trust"]["rule"] = line["anchor"]["estimator"] = line["anchor"]["placement"] = "word"
                line["anchor"]["gradient"] = "word"
        (harmless / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
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
        text.index(heading)
        for heading in ("In words", "Findings", "Figures", "Completions", "Settings", "Every update")
    ]
    assert places == sorted(places)
    assert "trust_max_kl=0.005" in text


def test_completions_at_start_middle_and_end(tmp_path: Path) -> None:
    shown = moments(read_run(run_folder(tmp_path, 12)))
    assert [(moment.when, moment.update) for moment in shown] == [("start", 1), ("middle", 7), ("end", 12)]
    two = moments(read_run(run_folder(tmp_path, 2)))
    assert [(moment.when, moment.update) for moment in two] == [("start", 1), ("end", 2)]
    assert [moment.when for moment in moments(read_run(run_folder(tmp_path, 1)))] == ["start"]


def test_a_long_completion_is_cut_and_its_length_told(tmp_path: Path) -> None:
    rows = [{**SAMPLE_KEYS, "completion": "<b>" * 4_000_000}]
    page = render_report(write_run(tmp_path, rows_of(1), rows))
    assert page.stat().st_size < 2_000_000
    assert "(11,998,800 more characters)" in Page(page.read_text("utf-8")).text


def test_several_runs_side_by_side(tmp_path: Path) -> None:
    folders = [run_folder(tmp_path / "one"), run_folder(tmp_path / "two", trust__limit=0.005)]
    page = render_report(folders, tmp_path / "out" / "both.html")
    text = Page(page.read_text("utf-8")).text
    assert "Side by side" in text and text.index("Side by side") < text.index("In words")
    assert "no limit" in text and "100 %" in text
    assert (tmp_path / "one" / "figures" / "anchor.svg").exists() and (
        tmp_path / "two" / "figures" / "anchor.png"
    ).exists()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_first_updates_of_a_run_have_a_report(tmp_path: Path, count: int) -> None:
    assert render_report(run_folder(tmp_path, count)).stat().st_size > 100_000


NUMBERS = {
    "": ["score", "lr", "length"],
    "anchor__": ["coef", "kl", "kl_exact", "kl_stderr", "share", "target"],
    "trust__": ["low", "epochs", "gated", "kl", "kl_max", "kl_proposed", "max_ratio"],
    "gradient__": ["norm", "max_norm", "scale"],
    "value__": ["explained_variance"],
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [None, 0.0, -1.0, 1e308, -1e308, 1e-308])
def test_numbers_missing_zero_or_extreme_have_a_report(tmp_path: Path, value: float | None) -> None:
    changes = {prefix + key: value for prefix, keys in NUMBERS.items() for key in keys}
    quantiles = {} if value is None else dict.fromkeys(("0.01", "0.5", "0.99"), value)
    render_report(run_folder(tmp_path, 5, **changes, trust__ratio_quantiles=quantiles))


# -- figures -----------------------------------------------------------------------------------------------------------


def test_figures_are_written_in_both_inks_and_as_pictures(ordinary: Path) -> None:
    folder = ordinary.parent / "figures"
    for name in FIGURES:
        light, dark = ((folder / f"{name}{ink}.svg").read_text("utf-8") for ink in ("", "-dark"))
        assert ET.fromstring(light).tag.endswith("svg") and ET.fromstring(dark).tag.endswith("svg")
        assert light != dark and len(light) == len(dark)
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_every_figure_has_labelled_axes_and_one_sentence(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    records = read_run(run_folder(tmp_path)).records
    for name, kind in FIGURES.items():
        figure = Figure()
        kind.draw(figure, records)
        assert all(axes.get_ylabel() for axes in figure.axes), name
        assert figure.axes[0].get_xlabel() or figure.axes[-1].get_xlabel(), name
        assert kind.caption.endswith(".") and kind.caption.count(". ") == 0, name


def test_equal_records_give_equal_figures(tmp_path: Path) -> None:
    records = read_run(run_folder(tmp_path)).records
    first, second = draw(records), draw(records)
    assert [figure.svg for figure in first] == [figure.svg for figure in second]


def test_drawing_leaves_pyplot_alone(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    code = f"""
import sys, matplotlib
before = matplotlib.rcParams.copy()
from trl_trustkl.report import render_report
render_report({str(folder)!r})
assert "matplotlib.pyplot" not in sys.modules and matplotlib.rcParams.copy() == before
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


def test_the_envelope_keeps_every_spike() -> None:
    y = np.zeros(10_000)
    y[4321], y[8765] = 9.0, -9.0
    found = envelope(np.arange(10_000.0), y, bins=200)
    assert len(found.x) == 200 and found.high.max() == 9 and found.low.min() == -9 and not found.median.any()
    gap = np.where(np.arange(10_000) < 5_000, np.nan, 1.0)
    assert np.isfinite(envelope(np.arange(10_000.0), gap, bins=200).median).sum() == 100


# -- long runs ---------------------------------------------------------------------------------------------------------


def test_ten_thousand_updates_in_ten_seconds_and_five_megabytes(tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    rows = rows_of(10_000)
    for row, (a, b, c, d) in zip(rows, draws.lognormal(size=(10_000, 4)), strict=True):
        row["score"], row["anchor"]["kl_exact"], row["anchor"]["coef"] = float(a), float(6 * b), float(c)
        row["trust"] |= {
            "kl": 0.01 * d,
            "kl_proposed": 0.02 * d,
            "limit": 0.02,
            "max_ratio": 1 + a,
            "scale": min(1.0, b),
        }
        row["gradient"]["norm"] = float(c)
    run = write_run(tmp_path, rows, completions_of(rows))
    started = time.process_time()
    page = render_report(run)
    assert time.process_time() - started < 10
    assert page.stat().st_size < 5_000_000
    assert all(file.stat().st_size < 600_000 for file in (tmp_path / "figures").iterdir())
    assert len(updates(read_run(run)).rows) == ROWS


# -- the command -------------------------------------------------------------------------------------------------------


def invoke(*arguments: str) -> int:
    parser = ArgumentParser()
    command.add_arguments(parser)
    options = parser.parse_args(arguments)
    return options.run(options)


def test_the_command_says_where_the_page_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folder(tmp_path / "run\x1b[31m", score=float("nan"))
    assert invoke(str(folder)) == 0
    out, err = capsys.readouterr()
    assert "report.html" in out and "figures" in out and "not finite" in err
    assert "\x1b" not in out + err


def test_a_page_that_cannot_be_written_is_an_error_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="the report cannot be written"):
        invoke(str(run_folder(tmp_path / "run")), "--output", str(tmp_path / "file" / "page.html"))


@pytest.mark.parametrize(("package", "module"), [("jinja2", "html"), ("matplotlib", "figures")])
def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"trl_trustkl.report.{module}", raising=False)
    monkeypatch.delattr(report, module, raising=False)
    with pytest.raises(MissingPackageError, match=rf"{package}.* pip install 'trl-trustkl\[report\]'"):
        render_report(run_folder(tmp_path))


def test_the_data_of_a_figure_is_the_figure(ordinary: Path) -> None:
    page = Page(ordinary.read_text("utf-8"))
    sources = [a["src"] for tag, a in page.elements if tag == "img" and a["class"] == "light"]
    svgs = [base64.b64decode((source or "").partition(",")[2]).decode() for source in sources]
    assert svgs == [(ordinary.parent / "figures" / f"{name}.svg").read_text("utf-8") for name in FIGURES]
