"""Flags and YAML files of `trustkl train`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.training import flags, run_main, settings, write_yaml
from trl_trustkl.cli.train_options import parse
from trl_trustkl.errors import ConfigError


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "it must be a YAML file of options"),
        ("- a list", "must contain a YAML mapping"),
        ("self: 1", "with 'self', which is not an option"),
        ("1: 2", "with 1, which is not an option"),
        ("trainer: [grpo]", "`trainer` got ['grpo']"),
        ("a: [", "while parsing"),
        ("kl_cof: 1", "unknown option --kl_cof 1. Did you mean --kl_coef?"),
        ("kl_estimator: k4", "`kl_estimator` got 'k4'"),
    ],
)
def test_the_error_for_a_bad_yaml_file_is_one_line(place: Path, tmp_path: Path, capsys, content, message) -> None:
    file = tmp_path / "run.yaml"
    if content is not None:
        file.write_text(content)
    run = flags({k: v for k, v in settings(place, tmp_path / "run").items() if not k.startswith("kl_")})
    assert run_main("--config", str(file), *run) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


def test_flags_override_the_yaml_file_and_both_spellings_of_config_are_read(place: Path, tmp_path: Path) -> None:
    file = write_yaml(tmp_path / "run.yaml", settings(place, tmp_path, kl_target=9.0, reward_funcs="my_rewards.even"))
    for words in (["--config", file], [f"--config={file}"]):
        options = parse([*words, "--kl-target", "2.0", "--lora_r=8"])
        assert (options.training.kl_target, options.model.lora_r) == (2.0, 8)
        assert options.training.kl_controller_kwargs == {"horizon": 100}
        assert options.script.reward_funcs == ["my_rewards.even"], (
            "a single function in YAML was not read as a list of one"
        )


@pytest.mark.parametrize(
    ("changes", "words", "message"),
    [
        ({}, ["--lora_rr", "3"], "unknown option --lora_rr 3. Did you mean --lora_r?"),
        ({}, ["--zzz"], "unknown option --zzz. All options: trustkl train --help-all."),
        ({}, ["--config"], "`config` got None; it must be a YAML file of options."),
        ({"sft_model_path": "m"}, [], "`sft_model_path` got 'm'; trustkl train takes `model_name_or_path`."),
        ({"datasets": [{"path": "json"}]}, [], "give exactly one"),
    ],
)
def test_options_that_cannot_be_understood_are_an_error(place: Path, tmp_path: Path, changes, words, message) -> None:
    file = write_yaml(tmp_path / "run.yaml", settings(place, tmp_path, **changes))
    with pytest.raises(ConfigError) as error:
        parse(["--config", file, *words] if words != ["--config"] else words)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_r": 8}, "`lora_r` got 8 without `use_peft`"),
        ({"lora_target_modules": ["q_proj"]}, "`lora_target_modules` got"),
        ({"use_dora": True}, "`use_dora` got True without `use_peft`"),
        ({"use_peft": True, "bnb_4bit_quant_type": "fp4"}, "`bnb_4bit_quant_type` got 'fp4' without `load_in_4bit`"),
    ],
)
def test_options_of_an_adapter_or_of_quantization_that_would_be_ignored_are_an_error(
    place: Path, tmp_path: Path, changes, message
) -> None:
    given = {
        name: value for name, value in settings(place, tmp_path).items() if not name.startswith(("lora_", "use_peft"))
    }
    with pytest.raises(ConfigError, match=message):
        parse(["--config", write_yaml(tmp_path / "run.yaml", given | changes)])


@pytest.mark.parametrize(("value", "expected"), [(True, "True"), (False, "False"), ("checkpoint-3", "checkpoint-3")])
def test_a_yaml_file_may_say_true_for_the_newest_checkpoint(place: Path, tmp_path: Path, value, expected) -> None:
    file = write_yaml(tmp_path / "run.yaml", settings(place, tmp_path, resume_from_checkpoint=value))
    assert parse(["--config", file]).training.resume_from_checkpoint == expected
