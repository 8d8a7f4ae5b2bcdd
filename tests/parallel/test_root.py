"""The module around a sharded model."""

from __future__ import annotations

import torch

from tests import tiny
from trl_trustkl.parallel.root import Root


def test_a_pass_is_one_of_the_model_or_a_call_within_the_module() -> None:
    model = tiny.llama()
    root, ids, inside = Root(model), torch.tensor([[5, 6, 7]]), []
    handle = root.register_forward_pre_hook(lambda *_: inside.append("hook"))
    with torch.no_grad():
        assert torch.equal(root(input_ids=ids).logits, model(input_ids=ids).logits)
        assert torch.equal(root(call=lambda: model(input_ids=ids)).logits, model(input_ids=ids).logits)
    handle.remove()
    assert inside == ["hook", "hook"]


def test_it_names_the_layers_of_its_models_and_ties_their_weights() -> None:
    model = tiny.llama(tie_word_embeddings=True)
    root = Root(model)
    assert root._no_split_modules == ["LlamaDecoderLayer"] and root.config is model.config
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    root.tie_weights()
    assert model.lm_head.weight is model.get_input_embeddings().weight
