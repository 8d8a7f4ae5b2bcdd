"""`trust_max_kl` in two processes: both take the same scale, and the limit holds over the batch of both."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest

from tests.processes import in_two_processes
from tests.tiny import LIMIT
from trl_trustkl import load_records

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.processes]
LIMITS = {"trust_max_kl_token": 0.02, "trust_max_kl_response": 0.05, "anchor_max_kl": 0.05}
TWO_PROCESSES = """
    import json, sys
    from pathlib import Path

    from tests.end_to_end.careful import FULL, careful
    from tests.tiny import FAST
    from tests.witness import witnessed
    from trl_trustkl.policy.loading import trainable

    def run(folder, **arguments):
        changes = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, num_mini_batches=2, max_steps=3)
        changes |= dict(trust_controller="threshold", trust_coef=0.1, trust_target=0.01, trust_lr_target=0.01)
        trainer = careful(folder, changes=changes, **arguments)
        assert trainer.accelerator.num_processes == 2
        enforced, enforce = [], trainer.enforce

        def kept(batch, proposed):
            measured = enforce(batch, proposed)
            weights = [float(p.detach().double().abs().sum()) for p in trainable(trainer.model)]
            own = dict(dense=trainer.dense[-1], tokens=int(batch.scored.rollout.response_mask.sum()))
            enforced.append([batch.context.enforcement._asdict(), measured._asdict(), weights, own])
            return measured

        trainer.enforce = kept
        trainer.train()
        rank = trainer.accelerator.process_index
        out = dict(enforced=enforced, states=trainer.parts.coefficients.state_dict())
        Path(f"{folder}-rank{rank}.json").write_text(json.dumps(out))

    def limited(folder, limit, value):
        changes = FAST | dict(per_device_train_batch_size=2, max_steps=4, trust_max_kl=None) | {limit: value}
        trainer = witnessed(folder, changes=changes)
        trainer.train()
        rank = trainer.accelerator.process_index
        Path(f"{folder}-rank{rank}.json").write_text(json.dumps([dense._asdict() for dense in trainer.dense]))

    for limit, value in json.loads(sys.argv[2]).items():
        limited(sys.argv[1] + "/" + limit, limit, value)
    run(sys.argv[1] + "/lora")
    run(sys.argv[1] + "/full", **FULL)
"""


def test_two_processes_take_the_same_scale_and_hold_the_limit_over_the_batch_of_both(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(textwrap.dedent(TWO_PROCESSES))
    in_two_processes(str(script), str(tmp_path), json.dumps(LIMITS), cwd=tmp_path)
    for field, limit in LIMITS.items():
        assert_held_over_both_parts(tmp_path, field, limit)
    for kind in ("lora", "full"):
        one, other = (json.loads((tmp_path / f"{kind}-rank{rank}.json").read_text()) for rank in range(2))
        assert one["states"] == other["states"]
        records = load_records(tmp_path / kind)
        assert len(records) == len(one["enforced"]) == 3, "more than one process wrote records"
        for record, mine, theirs in zip(records, one["enforced"], other["enforced"], strict=True):
            assert mine[:3] == theirs[:3], "the processes differ"
            enforcement, measured, _, own = mine
            trust = record["trust"]
            assert trust["scale"] == enforcement["scale"] < 1 and trust["tries"] == enforcement["tries"] >= 1
            assert trust["kl"] == measured["kl"] <= LIMIT == trust["guaranteed"] < trust["kl_proposed"]
            tokens = own["tokens"] + theirs[3]["tokens"]
            assert measured["tokens"] == tokens and measured["complete"]
            pooled = (own["dense"] * own["tokens"] + theirs[3]["dense"] * theirs[3]["tokens"]) / tokens
            assert pooled == pytest.approx(trust["kl"], abs=1e-5)
            assert own["dense"] != theirs[3]["dense"], "both processes had the same rows"


def assert_held_over_both_parts(folder: Path, field: str, limit: float) -> None:
    """By a witness in float64 of each process's rows; both have as many responses."""
    mine, theirs = (json.loads((folder / f"{field}-rank{rank}.json").read_text()) for rank in range(2))
    records = load_records(folder / field)
    assert len(records) == len(mine) == 4 and sum(record["trust"]["decided"] == field for record in records) >= 2
    for record, one, other in zip(records, mine, theirs, strict=True):
        trust, anchor = record["trust"], record["anchor"]
        token, response = (max(one[key], other[key]) for key in ("token", "response"))
        before, after = ((one[key] + other[key]) / 2 for key in ("anchor_before", "anchor"))
        assert (trust["kl_max"], trust["kl_response_max"]) == pytest.approx((token, response), rel=1e-3, abs=2e-5)
        found = {
            "trust_max_kl_token": (token, limit, trust["guaranteed_token"]),
            "trust_max_kl_response": (response, limit, trust["guaranteed_response"]),
            "anchor_max_kl": (after, max(limit, before), anchor["guaranteed"]),
        }
        dense, allowed, guaranteed = found[field]
        assert dense <= allowed + 2e-5 and guaranteed == pytest.approx(allowed, abs=2e-5)
        if field == "anchor_max_kl":
            assert anchor["kl_after"] == pytest.approx(after, abs=2e-5)
        assert one["token"] != other["token"] or one["token"] == 0, "both processes had the same rows"
