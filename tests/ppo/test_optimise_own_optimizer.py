"""An optimizer that the user gives to the trainer."""

from __future__ import annotations

import pytest
import torch

from tests import tiny
from tests.messages import assert_says
from tests.weights import trained_weights
from trl_trustkl.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    ("optimizer", "pieces"),
    [
        (
            lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
            ("`optimizers` got", "28 of the 28", "`peft_config`", "get_peft_model"),
        ),
        (lambda model: torch.optim.SGD, ("`optimizers[0]` got", "torch.optim")),
    ],
    ids=["made before the adapter", "a class"],
)
def test_an_optimizer_that_would_train_nothing_is_rejected(tmp_path, optimizer, pieces):
    model = tiny.llama()
    with pytest.raises(ConfigError) as error:
        tiny.trainer(tmp_path, model, optimizers=(optimizer(model), None))
    assert_says(error, *pieces)


@pytest.mark.parametrize("scheduled", [True, False])
@pytest.mark.parametrize("peft", [True, False], ids=["lora", "full"])
def test_a_custom_optimizer_trains_the_value_too(tmp_path, peft, scheduled):
    model = tiny.adapted() if peft else tiny.llama()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0) if scheduled else None
    changes = {} if scheduled else {"value_learning_rate": 0.01}
    trainer = tiny.trainer(tmp_path, model, optimizers=(optimizer, scheduler), peft_config=None, changes=changes)
    before = trained_weights(trainer.model)
    trainer.train()
    after = trained_weights(trainer.model)
    assert {name for name in before if torch.equal(before[name], after[name])} == set()
    rates = {id(p): group["initial_lr"] for group in optimizer.param_groups for p in group["params"]}
    expected = 1e-3 if scheduled else 0.01
    assert {rates[id(p)] for p in trainer.model.value.parameters()} == {expected}
