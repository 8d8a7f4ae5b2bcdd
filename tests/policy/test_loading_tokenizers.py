"""Tokenizers without a pad token."""

from __future__ import annotations

import pytest

from tests import tiny
from tests.messages import assert_says
from tests.scripted import EOS, scripted
from tests.survival import without_clock
from trl_trustkl import load_records
from trl_trustkl.errors import ModelError

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_tokenizer_without_a_pad_token_gets_its_eos_and_the_masks_stay_right(tmp_path, family):
    tokenizer = tiny.tokenizer(pad=False)
    script = [([5, 7, EOS], 3), ([5, EOS], 2), ([9, 8, 7, 6, 5, 4], 6)]
    trainer = scripted(tmp_path, script, processing_class=tokenizer, model=tiny.FAMILIES[family]())
    trainer.train()
    scored = trainer.scored
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == EOS
    # The eos token at the end is part of the response, although it is the padding token too; what follows is not.
    assert scored.loss_mask.sum(1).tolist() == [script[i % 3][1] for i in range(8)]
    assert (scored.logp[scored.loss_mask] < 0).all() and (scored.logp[~scored.loss_mask] == 0).all()
    record = load_records(tmp_path)[0]
    assert record["eos_rate"] == 6 / 8
    assert record["length"] == scored.loss_mask.sum() / 8


def test_sampling_without_a_pad_token_equals_sampling_with_one(tmp_path):
    def even_ids(prompts, completions, completion_ids, **_):
        return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]

    for name, pad in (("with", True), ("without", False)):
        tiny.trainer(tmp_path / name, processing_class=tiny.tokenizer(pad=pad), reward_funcs=even_ids).train()
    one, other = ([without_clock(r) for r in load_records(tmp_path / name)] for name in ("with", "without"))
    assert one == other


def test_a_tokenizer_with_neither_pad_nor_eos_token_is_an_error(tmp_path):
    tokenizer = tiny.tokenizer(pad=False)
    tokenizer.eos_token = None
    with pytest.raises(ModelError) as error:
        tiny.trainer(tmp_path, processing_class=tokenizer)
    assert_says(error, "`processing_class`", "neither a pad token nor an eos token", "add_special_tokens")
