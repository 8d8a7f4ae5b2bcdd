"""`trust_max_kl` over many updates, confirmed by a computation that shares nothing with the trainer's (tests/witness.py)."""

from __future__ import annotations

import statistics
from typing import Any

import pytest

from tests import tiny
from tests.pinned import ON_PINNED_TRANSFORMERS
from tests.witness import TOO_FAST, Update, Witnessed, assert_within, pretending, witnessed
from trl_trustkl.policy.quantization import is_quantized

pytestmark = pytest.mark.filterwarnings("ignore")
LIMIT = 0.02


def assert_worked(updates: list[Update], limit: float) -> None:
    """The limit was needed: most updates proposed far more, and were shortened no more than necessary."""
    proposed = [record.trust.kl_proposed for record, _, _ in updates]
    assert sum(kl > limit for kl in proposed) > 0.6 * len(updates)
    assert statistics.median(proposed) > 3 * limit
    for record, _, _ in updates:
        trust = record.trust
        if trust.kl_proposed > limit:
            assert 0 <= trust.scale < 1 and 1 <= trust.tries <= 10
        else:
            assert trust.scale == 1 and trust.tries == 0 and trust.kl == trust.kl_proposed
    kept = [dense for record, dense, _ in updates if 0 < record.trust.scale < 1]
    assert sum(record.trust.scale == 0 for record, _, _ in updates) <= 0.01 * len(
        updates
    )  # backtracking found no scale within the limit
    assert sum(kl > 0.5 * limit for kl in kept) > 0.95 * len(kept)


def cost(updates: list[Update]) -> str:
    """What enforcement cost: its share of the seconds of the updates."""
    total = sum(record.seconds["total"] for record, _, _ in updates)
    measuring = sum(record.seconds["measure"] for record, _, _ in updates)
    enforcing = sum(seconds for _, _, seconds in updates)
    tries = statistics.mean(record.trust.tries for record, _, _ in updates)
    return (
        f"enforcement took {enforcing / total:.1%} of the update (measuring and enforcing {measuring / total:.1%}), "
        f"{tries:.1f} tries and {total / len(updates):.3f} s an update"
    )


@pytest.mark.parametrize(
    ("family", "updates"), [("llama", 40), *(pytest.param(name, 200, marks=pytest.mark.slow) for name in tiny.FAMILIES)]
)
def test_the_limit_holds_after_each_update_ten_times_too_fast(family, updates, tmp_path):
    changes = TOO_FAST | {"max_steps": updates, "trust_max_kl": LIMIT}
    trainer = witnessed(tmp_path, tiny.FAMILIES[family](), changes=changes)
    trainer.train()
    assert len(trainer.updates) == updates
    assert_within(trainer.updates, LIMIT)
    if ON_PINNED_TRANSFORMERS:  # other versions sample other responses from the same seed
        assert_worked(trainer.updates, LIMIT)
    print(f"\n{family}: {cost(trainer.updates)}")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_without_the_limit_the_same_run_exceeds_it(family, tmp_path):
    free = witnessed(tmp_path / "free", tiny.FAMILIES[family](), changes=TOO_FAST | {"max_steps": 5})
    free.train()
    for record, dense, _ in free.updates:
        assert dense == pytest.approx(record.trust.kl, rel=1e-4, abs=1e-5)
        assert record.trust.scale is None and record.trust.limit is None and record.trust.guaranteed is None
    assert max(dense for _, dense, _ in free.updates) > 4 * LIMIT
    changes = TOO_FAST | {"max_steps": 1, "trust_max_kl": LIMIT}
    held = witnessed(tmp_path / "held", tiny.FAMILIES[family](), changes=changes)
    held.train()
    assert held.updates[0].record.trust.kl_proposed == free.updates[0].record.trust.kl, (
        "the two runs differ in their first update"
    )


def test_the_witness_would_see_a_limit_that_is_not_held(tmp_path):
    """A trainer that only reports an enforcement is detected."""
    trainer = witnessed(tmp_path, changes=TOO_FAST | {"max_steps": 2, "trust_max_kl": LIMIT})
    pretending(trainer).train()
    with pytest.raises(AssertionError):
        assert_within(trainer.updates, LIMIT)


def smollm2(folder: Any, **changes: Any) -> Witnessed:
    """The demo's model and prompts, with more than ten times the demo's learning rate of 7e-4."""
    from datasets import Dataset
    from peft import LoraConfig

    from trl_trustkl.demo.prompts import TRAIN_PROMPTS
    from trl_trustkl.demo.smollm2 import load_smollm2

    model, tokenizer = load_smollm2()
    settings = TOO_FAST | {
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "num_ppo_epochs": 2,
        "response_length": 12,
    }
    rows = [[{"role": "user", "content": prompt}] for prompt in TRAIN_PROMPTS]
    return witnessed(
        folder,
        model,
        changes=settings | changes,
        processing_class=tokenizer,
        reward_funcs=lambda prompts, completions, **_: [c[0]["content"].count("e") / 10 for c in completions],
        train_dataset=Dataset.from_dict({"prompt": rows}),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


@pytest.mark.slow
def test_the_limit_holds_after_each_of_30_updates_of_smollm2_with_qlora(tmp_path):
    trainer = smollm2(tmp_path, max_steps=30, trust_max_kl=LIMIT)
    assert is_quantized(trainer.model.policy)
    trainer.train()
    assert len(trainer.updates) == 30
    assert_within(trainer.updates, LIMIT, rounding=1e-6)
    assert_worked(trainer.updates, LIMIT)
    print(f"\nSmolLM2, QLoRA: {cost(trainer.updates)}")


@pytest.mark.slow
def test_without_the_limit_smollm2_exceeds_it(tmp_path):
    trainer = smollm2(tmp_path, max_steps=3)
    trainer.train()
    assert max(dense for _, dense, _ in trainer.updates) > 4 * LIMIT
    assert all(record.trust.guaranteed is None for record, _, _ in trainer.updates)
