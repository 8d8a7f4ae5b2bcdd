"""The settings of a comparison, from a file and the command line, and their checks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.compare.jobs import yaml_file
from trl_trustkl.compare import settings
from trl_trustkl.errors import ConfigError


def test_the_four_corners_by_default() -> None:
    by_default = settings.validate(settings.read())
    assert (by_default.updates, by_default.seeds) == (20, (42,))
    switched = [(fields["kl_coef"] > 0, fields["clip_rule"] != "none") for fields in by_default.settings.values()]
    assert switched == [(True, True), (False, True), (True, False), (False, False)]
    assert [settings.slug(name) for name in by_default.settings][:2] == ["anchor-and-clip", "clip-only"]


def test_a_file_with_everything_and_what_the_command_line_changes(tmp_path: Path) -> None:
    file = yaml_file(
        tmp_path,
        "updates: 7\nseeds: [1, 2]\ncommon: {learning_rate: 1e-4, cliprange: 0.1}\n"
        "settings:\n  a: {cliprange: 0.3, clip_kwargs: {}}\n  b: {}\n",
    )
    found = settings.validate(settings.read(file))
    assert (found.updates, found.seeds) == (7, (1, 2))
    # YAML 1.1 reads 1e-4, without a point, as text
    assert found.settings == {
        "a": {"learning_rate": 1e-4, "cliprange": 0.3, "clip_kwargs": {}},
        "b": {"learning_rate": 1e-4, "cliprange": 0.1},
    }
    changed = settings.read(file, updates=3, seeds=[9])
    assert (changed.updates, changed.seeds) == (3, (9,))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds nothing; it must be a mapping"),
        ("{}", "holds a dict; it must be a mapping with any of updates"),
        ("- 1", "holds a list"),
        ("a: [1", "is not YAML: while parsing a flow sequence"),
        ("a: !!python/object/apply:os.system ['true']", "is not YAML: could not determine a constructor"),
        ("seed: 1", "got 'seed'; it must be one of 'common', 'seeds', 'settings', 'trainer', 'updates'. Did you mean 'seeds'?"),
        ("updates: 2\nupdates: 3", "the key 'updates' occurs twice"),
        ("settings: {a: {kl_coef: 1}, a: {}}", "the key 'a' occurs twice"),
        ("updates: 0", "`updates` got 0; it must be an integer from 1"),
        ("updates: true", "`updates` got True"),
        ("updates: 2.5", "`updates` got 2.5"),
        ("seeds: 42", "`seeds` got 42; it must be a list of integers. One seed is seeds: [42]."),
        ("seeds: []", "`seeds` got []"),
        ("seeds: [1, x]", "`seeds` got 'x'"),
        ("seeds: [-1]", "`seeds` got -1"),
        ("seeds: [1, 2, 1]", "`seeds` got 1 twice"),
        ("settings: {}", "`settings` got {}; it must be a mapping with an entry. Fix: leave it out."),
        ("common:", "`common` got None"),
        ("settings: {a: }", "`settings → a` got None; it must be a mapping of configuration fields. {} leaves the task as it"),
        ("settings: {1: {}}", "`settings` got 1; it must be a name with a letter or a digit, at most 60 characters of "
         "text. Put a number in quotes."),
        ("settings: {'--': {}}", "`settings` got '--'"),
        (f"settings: {{{'x' * 61}: {{}}}}", "at most 60 characters"),
        ("settings: {a b: {}, a-B: {}}", "got 'a b' and 'a-B', which would share the folder 'a-b'"),
        ("settings: {a: {seed: 1}}", "got 'seed', which the comparison sets; use `seeds` instead"),
        ("common: {max_steps: 1}", "use `updates` instead"),
        ("settings: {a: {kl_coeff: 1}}", "setting 'a': `field of TrustKLPPOConfig` got 'kl_coeff'"),
        ("settings: {a: {kl_coeff: 1}}", "Did you mean 'kl_coef'?"),
        ("settings: {a: {clip_rule: pop}}", "setting 'a': `clip_rule` got 'pop'"),
        ("settings: {a: {kl_coef: much}}", "`kl_coef` got 'much'; it must be a finite number"),
        ("settings: {a: {kl_coef: -1}}", "`kl_coef` got -1; it must be a finite number >= 0"),
        ("settings: {a: {kl_coef: .nan}}", "setting 'a': Out of range float"),
        ("settings: {a: {num_ppo_epochs: 1.5}}", "`num_ppo_epochs` got 1.5; it must be an integer"),
        ("settings: {a: {whiten_advantages: 'yes'}}", "`whiten_advantages` got 'yes'; it must be true or false"),
        ("settings: {a: {kl_estimator: 3}}", "`kl_estimator` got 3"),
        ("settings: {a: {kl_target: 6}}", "`kl_target` got 6, but kl_controller='fixed' ignores it"),
        ("settings: {a: {clip_kwargs: 2020-01-01}}", "setting 'a': Object of type date"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_an_error_that_names_it(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        settings.validate(settings.read(yaml_file(tmp_path, text)))
    assert said in str(error.value)


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.yaml cannot be read: No such file"):
        settings.read(tmp_path / "nowhere.yaml")
    (tmp_path / "bytes").write_bytes(b"a: \xff\xfe")
    with pytest.raises(ConfigError, match=r"is not YAML: unacceptable character"):
        settings.read(tmp_path / "bytes")


def test_the_configuration_of_the_task_is_used_if_it_is_known() -> None:
    """16 mini-batches are valid for the demo's task, but too many for the defaults of the configuration."""
    from trl_trustkl.demo.task import sentiment_config

    asked = settings.Comparison(1, (1,), {"a": {"num_mini_batches": 16}})
    assert settings.validate(asked, sentiment_config).settings == asked.settings
    with pytest.raises(ConfigError, match="`num_mini_batches` got 32"):
        settings.validate(asked._replace(settings={"a": {"num_mini_batches": 32}}), sentiment_config)


@pytest.mark.parametrize(("trainer", "config"), [("grpo", "TrustKLGRPOConfig"), ("rloo", "TrustKLRLOOConfig")])
def test_the_settings_of_another_trainer_are_fields_of_its_configuration(tmp_path, trainer, config):
    asked = settings.read(yaml_file(tmp_path, f"trainer: {trainer}\ncommon: {{per_device_train_batch_size: 8}}"))
    assert asked.trainer == trainer and list(asked.settings) == [
        "anchor + limit",
        "limit only",
        "anchor only",
        "neither",
    ]
    assert settings.validate(asked).settings["limit only"]["trust_max_kl"] == settings.LIMIT
    asked = settings.read(yaml_file(tmp_path, f"trainer: {trainer}\nsettings: {{a: {{kl_coef: 0.1}}}}"))
    with pytest.raises(ConfigError, match=f"field of {config}"):
        settings.validate(asked)
    with pytest.raises(ConfigError, match="`trainer` got 'gropo'"):
        settings.read(yaml_file(tmp_path, "trainer: gropo"))
