"""Gradients of the complete loss with adapters on the output head or the embeddings, against a dense loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from tests import tiny
from tests.dense import dense_kl, dense_logps
from tests.tiny import ANCHORED
from tests.watched import before_the_first_step
from trl_trustkl.policy.loading import trainable
from trl_trustkl.types import Batch

pytestmark = pytest.mark.filterwarnings("ignore")
QV = ["q_proj", "v_proj"]


def tied() -> Any:
    return tiny.llama(tie_word_embeddings=True)


def on(*modules: str, **more: Any) -> dict[str, Any]:
    return {"peft_config": tiny.lora(target_modules=[*QV, *modules], **more)}


ADAPTED: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Any]]]] = {
    "only the head": (tiny.llama, lambda: {"peft_config": tiny.lora(target_modules=["lm_head"])}),
    "the head, soft-capped": (tiny.gemma2, lambda: on("lm_head")),
    "the head, tied": (tied, lambda: on("lm_head")),
    "the head, DoRA": (tiny.llama, lambda: on("lm_head", use_dora=True)),
    "the head in full, tied": (tied, lambda: on(modules_to_save=["lm_head", "embed_tokens"])),
    "embeddings, tied": (tied, lambda: on("embed_tokens")),
    "a few tokens": (tiny.llama, lambda: on(trainable_token_indices=[5, 6, 7])),
    "a few tokens, tied": (tied, lambda: on(trainable_token_indices=[5, 6, 7])),
    "given with the model, on the head": (
        lambda: get_peft_model(tiny.llama(), on("lm_head")["peft_config"]), lambda: {"peft_config": None},
    ),
    "everything, tied": (tied, lambda: {"peft_config": None}),
}  # fmt: skip


def dense_loss(trainer: Any, batch: Batch, old: list[Tensor], ref: list[Tensor]) -> Tensor:
    """The policy's loss of the entire batch, from the model's complete forward pass, in float64 after its logits."""
    total, scored = 0.0, batch.scored
    for micro, o, q in zip(scored.micro_batches, old, ref, strict=True):
        inputs = {name: getattr(micro, name) for name in ("input_ids", "attention_mask", "position_ids")}
        length, mask = micro.response_ids.shape[1], micro.response_mask
        logits = trainer.model.policy(**inputs).logits[:, -length - 1 : -1]
        p = (logits.double() / trainer.args.temperature).log_softmax(-1)
        logp = p.gather(-1, micro.response_ids.unsqueeze(-1)).squeeze(-1)
        ratio = (logp - scored.logp[micro.rows, :length].double()).exp()
        terms = -ratio * batch.advantages[micro.rows, :length].double()
        terms = terms + batch.anchor.coef * batch.advantage_scale * dense_kl(p, q) + batch.trust_coef * dense_kl(o, p)
        total = total + terms[mask].sum()
    return total / scored.loss_mask.sum()


@pytest.mark.parametrize("kind", ADAPTED)
def test_an_adapter_on_the_head_or_the_embeddings_gets_its_full_gradient(kind, tmp_path, small_chunks):
    model, arguments = ADAPTED[kind]
    trainer = tiny.trainer(tmp_path, model(), changes=ANCHORED, **arguments())
    batch = before_the_first_step(trainer)
    policy, micros = trainer.model.policy, batch.scored.micro_batches
    old = [dense_logps(policy, micro, 0.7) for micro in micros]
    with torch.no_grad():
        for parameter in trainable(policy):
            parameter.add_(0.05 * torch.randn_like(parameter))
    reference = trainer.reference.model or policy
    with trainer.reference.active():
        ref = [dense_logps(reference, micro, 0.7) for micro in micros]
    trained = trainable(policy)
    expected = torch.autograd.grad(dense_loss(trainer, batch, old, ref), trained)
    penalties = trainer.args.build_penalties(batch.anchor.coef * batch.advantage_scale, batch.trust_coef)
    trainer.parts.optimisation._backward(batch, [*range(len(micros))], trainer.args.build_surrogate(), penalties)
    for parameter, gradient in zip(trained, expected, strict=True):
        assert (parameter.grad - gradient).norm() <= 1e-4 * gradient.norm()
    trainer.optimise(batch)
    with trainer.reference.active():
        after = [dense_logps(reference, micro, 0.7) for micro in micros]
    for now, then in zip(after, ref, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=1e-6)
    assert trainable(policy) == trained and trainer.measure(batch).kl > 0
