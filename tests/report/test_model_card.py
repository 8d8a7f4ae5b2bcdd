"""The model card: its section agrees with the records, and the rest of the card is as TRL writes it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests import tiny
from tests.example_runs import record
from trl_trustkl import BoundReportCallback, load_records
from trl_trustkl.report.model_card import END, START, TITLE, outcome, section, with_section
from trl_trustkl.report.text import markdown, number

pytestmark = pytest.mark.usefixtures("model_cards")
SECTION = re.compile(f"{re.escape(START)}(.*?){re.escape(END)}", re.DOTALL)


def parts(readme: Path) -> tuple[dict, str, str]:
    """Front matter, the text of the package's only section, and the body."""
    text = readme.read_text("utf-8")
    _, front, body = text.split("---\n", 2)
    (found,) = SECTION.findall(body)
    assert text.count(TITLE) == 1
    return yaml.safe_load(front), found, body


def test_every_saved_model_says_how_far_it_moved(tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "trust_max_kl": 0.01}
    trainer = tiny.trainer(tmp_path, changes=changes, callbacks=[BoundReportCallback(report_every=1)])
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    rows = load_records(tmp_path)
    known = {"checkpoint-1": (rows[:1], "../report.html"), "checkpoint-2": (rows, "../report.html"),
             ".": (rows, "report.html"), "adapter": (rows, "../report.html")}  # fmt: skip
    for folder, (records, link) in known.items():
        front, text, _ = parts(tmp_path / folder / "README.md")
        anchor = records[-1]["anchor"]
        assert f"{number(anchor['kl_exact'])} ± {number(anchor['kl_stderr'], 2)} nats per response" in text
        largest = max(row["trust"]["kl"] for row in records)
        assert markdown(f"KL(π_old‖π) was {number(largest)} nats per token") in text
        bound = max(row["trust"]["guaranteed"] for row in records)
        assert f"at most {number(bound)} nats per token" in text
        assert "kl\\_estimator=k1, kl\\_placement=reward, kl\\_coef=0.05" in text
        assert "| clip | clip\\_rule=ppo, range \\[0.8, 1.2\\] |" in text and "trust\\_max\\_kl=0.01" in text
        assert f"(<{link}>)" in text and (tmp_path / folder / link).exists()
        assert {"trl", "ppo"} <= set(front["tags"]) if folder == "." else "tags" in front


def test_a_model_card_does_not_read_the_completions(tmp_path):
    trainer = tiny.trainer(tmp_path, changes={"max_steps": 1})
    trainer.train()
    (tmp_path / "completions.jsonl").write_text("not read\n")
    trainer.save_model(str(tmp_path / "adapter"))
    assert "nats per token on average" in parts(tmp_path / "adapter" / "README.md")[1]


def test_the_rest_of_trls_card_is_as_trl_writes_it(tmp_path, monkeypatch):
    trainer = tiny.trainer(tmp_path)
    readme = tmp_path / "README.md"
    monkeypatch.setattr(type(trainer), "_describe", lambda self, folder: None)
    trainer.create_model_card(model_name="m", tags=["b", "a"])
    plain = readme.read_text("utf-8")
    monkeypatch.undo()
    trainer.create_model_card(model_name="m", tags=["b", "a"])
    front, text, body = parts(readme)
    assert sorted(front.pop("tags")) == sorted(yaml.safe_load(plain.split("---\n")[1]).pop("tags"))
    without = SECTION.sub("", body).split()
    assert without == plain.split("---\n", 2)[2].split()
    assert body.index(START) < body.index("## Citations") and "no records of the run" in text


def test_the_section_is_replaced_and_never_repeated():
    card = "---\ntags: [a]\n---\n\n# Model\n\nwords\n\n## Citations\n\nbook\n"
    once = with_section(card, "first \\1 section")
    assert once.index("words") < once.index("first \\1 section") < once.index("## Citations")
    assert with_section(once, "first \\1 section") == once
    twice = with_section(once, "second")
    assert "first" not in twice and with_section(card, "second") == twice
    assert with_section("# Model\n", "x").startswith("# Model\n\n" + START)


SAVED = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}


def test_a_run_that_saves_nothing_writes_a_card_and_overwrites_no_other_readme(tmp_path):
    tiny.trainer(tmp_path / "new", changes={"max_steps": 1}).train()
    assert "nats per response" in parts(tmp_path / "new" / "README.md")[1]
    assert "report.html" not in (tmp_path / "new" / "README.md").read_text("utf-8")  # this run rendered no report
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("# My project\n")
    for changes, peft in (({"max_steps": 1}, {}), (SAVED, {}), (SAVED, {"peft_config": None})):
        tiny.trainer(tmp_path / "mine", changes=changes, **peft).train()
        assert (tmp_path / "mine" / "README.md").read_text() == "# My project\n"
    card = tmp_path / "mine" / "checkpoint-1" / "README.md"
    assert not card.exists() or "My project" not in card.read_text("utf-8")


def test_a_full_model_has_a_card_in_its_checkpoint_too(tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "kl_coef": 0.0, "clip_rule": "none"}
    tiny.trainer(tmp_path, changes=changes, peft_config=None).train()
    _, text, _ = parts(tmp_path / "checkpoint-1" / "README.md")
    assert "| clip | off |" in text and "π\\_ref) | off |" in text and "Nothing: no mechanism" in text


def test_controllers_and_limits_are_named_with_their_options(tmp_path):
    args = tiny.config(
        tmp_path, kl_controller="adaptive", kl_target=6.0, kl_controller_kwargs={"min_coef": 0.01}, trust_coef=0.5,
        trust_stop=0.03, trust_lr_target=0.02, max_grad_norm=0.5, response_mask_kl=0.1, clip_rule="troll",
        clip_kwargs={"limit": 0.03},
    )  # fmt: skip
    text = section([record()], args).replace("\\", "")
    assert "kl_controller=adaptive (min_coef=0.01), kl_target=6 nats per response" in text
    assert "| penalty on KL(π_old‖π) | trust_estimator=exact, trust_coef=0.5 |" in text
    assert "trust_stop=0.03 nats per token" in text and "trust_lr_target=0.02 nats per token" in text
    assert (
        "| response masks | response_mask_kl=0.1 nats |" in text and "| clip | clip_rule=troll (limit=0.03) |" in text
    )
    assert "max_grad_norm=0.5" in text and "| hard limits, by backtracking | off |" in text


@pytest.mark.parametrize(
    "hostile",
    ["<script>alert(1)</script>", "[x](javascript:alert(1))", "a | b\n\n# c", "![i](http://x)", "\x1b[31m`x`", END],
)
def test_no_text_is_read_as_markup(tmp_path, hostile):
    shown = markdown(hostile)
    assert re.search(r"(?<!\\)[<\[\]`|#!*_]", shown) is None and "\n" not in shown and "\x1b" not in shown
    args = tiny.config(tmp_path)
    args.clip_rule = hostile
    texts = [section([record()], args), *outcome([record(trust=record().trust._replace(rule=hostile))])]
    assert all(hostile not in text for text in texts)
    assert SECTION.findall(with_section("# m\n", texts[0]))[0].strip() == texts[0].strip()
