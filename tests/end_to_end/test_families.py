"""Many architectures: ratio 1 before the first step, numbers that do not depend on padding, and a limit that holds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests import families, tiny
from tests.dense import dense_kl
from tests.tiny import ANCHORED
from tests.watched import before_the_first_step

pytestmark = pytest.mark.filterwarnings("ignore")
LIMIT = 2e-4


@pytest.mark.parametrize("peft", [True, False], ids=["LoRA", "full"])
@pytest.mark.parametrize("name", families.TRANSFORMERS)
def test_a_family_starts_at_ratio_1_is_measured_without_padding_and_moves(name, peft, tmp_path):
    changes = ANCHORED | {"trust_max_kl": LIMIT}
    trainer = tiny.trainer(tmp_path, families.build(name), changes=changes, **({} if peft else {"peft_config": None}))
    assert trainer.model.split_lm.chunked
    batch = before_the_first_step(trainer)
    policy, scored = trainer.model.policy, batch.scored

    def row_logps_without_padding() -> list[Tensor]:
        """log π over the vocabulary of each response, one row at a time and without padding."""
        found = []
        for micro in scored.micro_batches:
            for ids, mask, response in zip(micro.input_ids, micro.attention_mask, micro.response_mask, strict=True):
                with torch.no_grad():
                    logits = policy(input_ids=ids[mask.bool()][None]).logits[0, -int(response.sum()) - 1 : -1]
                found.append((logits.double() / 0.7).log_softmax(-1))
        return found

    old = row_logps_without_padding()
    order = torch.cat([micro.rows for micro in scored.micro_batches])
    for row, p in zip(order, old, strict=True):
        mask = scored.rollout.response_mask[row]
        logp = p.gather(-1, scored.rollout.response_ids[row][mask][:, None])[:, 0]
        torch.testing.assert_close(scored.logp[row][mask].double(), logp, rtol=0, atol=1e-4)
    assert trainer.optimise(batch).refused is None
    proposed = trainer.measure(batch)
    measured = trainer.enforce(batch, proposed)
    dense = torch.cat([dense_kl(p, q) for p, q in zip(old, row_logps_without_padding(), strict=True)]).mean()
    assert 0 < measured.kl <= LIMIT < proposed.kl and measured.kl == pytest.approx(float(dense), rel=0.01, abs=1e-6)
