"""Generation options that the trainer sets."""

from __future__ import annotations

import pytest

from tests import tiny
from tests.messages import assert_says
from trl_trustkl.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize(
    ("key", "fix"),
    [
        ("max_new_tokens", "set response_length"),
        ("max_length", "set response_length"),
        ("temperature", "set temperature"),
        ("eos_token_id", "set stop_token_id"),
        ("pad_token_id", "tokenizer's pad token"),
        ("do_sample", "leave it out"),
        ("num_beams", "leave it out"),
        ("num_return_sequences", "leave it out"),
        ("use_cache", "leave it out"),
    ],
)
def test_generation_kwargs_that_the_trainer_owns_are_refused(tmp_path, key, fix, as_json):
    with pytest.raises(ConfigError) as error:
        tiny.config(tmp_path, generation_kwargs=f'{{"{key}": 1}}' if as_json else {key: 1})
    assert_says(error, "`generation_kwargs`", repr(key), fix)
