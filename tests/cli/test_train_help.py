"""The help text of `trustkl train`."""

from __future__ import annotations

from tests.cli.training import run_main
from trl_trustkl.cli import train_options


def test_help_fits_80_columns_and_shows_the_options_of_this_package(monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run_main("--help") == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for option in ("--trust_max_kl NUMBER", "--kl_estimator VALUE", "--lora_r INT", "--reward_funcs VALUE ..."):
        assert f"\n  {option}\n" in text
    assert "One of: none, ppo, dual" in " ".join(text.split()) and "(default: 0.05)" in text
    assert "--adam_beta1" not in text and "--sft_model_path" not in text and "143 after" in text
    assert run_main("--help-all") == 0
    assert "--adam_beta1 NUMBER" in capsys.readouterr().out


def test_every_field_of_this_package_has_a_help_text(capsys) -> None:
    from dataclasses import fields

    from trl_trustkl import TrustKLPPOConfig
    from trl_trustkl.options import about

    own = [each for each in fields(TrustKLPPOConfig) if about(each).group]
    added = train_options.TrainArguments.__annotations__
    own += [each for each in fields(train_options.TrainArguments) if each.name in added]
    run_main("--help")
    text = capsys.readouterr().out
    assert len(own) > 50
    for each in own:
        assert each.metadata["help"] and f"--{each.name} " in text


def test_each_option_is_in_one_section_and_the_rest_only_in_the_complete_help(capsys) -> None:
    run_main("--help")
    short = capsys.readouterr().out
    run_main("--help-all")
    everything = capsys.readouterr().out
    titles = ("data, rewards, models:", "policy: precision and LoRA:", "anchor:", "trust region:", "PPO:", "training:")
    places = [everything.index(f"\n{title}\n") for title in titles]
    assert places == sorted(places)
    options = [line.split()[0] for line in everything.splitlines() if line.startswith("  --")]
    assert len(options) == len(set(options)) > 150
    shown = [line.split()[0] for line in short.splitlines() if line.startswith("  --")]
    assert set(shown) < set(options) and len(shown) > 50
    assert "trustkl train --help-all" in short and "trustkl train --help-all" not in everything
