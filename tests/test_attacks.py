"""What an audit tried to break: heads of every kind in chunks, model families, numbers of a record recomputed from definitions,
and tokenizers that do not fit their model."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from peft import get_peft_model
from torch import Tensor, nn

from tests import tiny
from tests.test_exactness import dense_kl, dense_logps
from trl_trustkl import TrustKLPPOTrainer, load_records
from trl_trustkl.errors import ModelError, RewardError
from trl_trustkl.policy import exact_kl
from trl_trustkl.policy.exact_kl import token_statistics
from trl_trustkl.policy.loading import trainable
from trl_trustkl.policy.split_lm import OutputHead, SplitLM
from trl_trustkl.records import BoundRecord
from trl_trustkl.types import Batch, PolicySnapshot, Scored

pytestmark = pytest.mark.filterwarnings("ignore")
EOS, V, H, N = 2, 37, 16, 29


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks of several blocks each, the last of them not full, where a tiny model would have one."""
    monkeypatch.setattr(exact_kl, "CHUNK_ELEMENTS", tiny.VOCAB * 5)
    monkeypatch.setattr(exact_kl, "CACHE_ELEMENTS", tiny.VOCAB * 2)


# -- the head in chunks ------------------------------------------------------------------------------------------------


class WithLora(nn.Module):
    """A frozen projection with a low-rank one beside it."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(H, 3, bias=False), nn.Linear(3, V, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2 * self.up(self.down(x))


HEADS: dict[str, Callable[[], nn.Module]] = {
    "frozen": lambda: nn.Linear(H, V).requires_grad_(False),
    "trained": lambda: nn.Linear(H, V, bias=False),
    "trained, bias": lambda: nn.Linear(H, V),
    "LoRA": lambda: WithLora(nn.Linear(H, V)),
}
CAP = SimpleNamespace(final_logit_softcapping=1.5, logits_scaling=1.3, logit_scale=0.9)
COLUMNS = ("logp", "entropy", "ref_kl", "old_kl")
PRECISIONS = {  # dtype, autocast, how near
    "float32": (torch.float32, False, 1e-5),
    "float64": (torch.float64, False, 1e-12),
    "bf16 autocast": (torch.float32, True, 0.02),
    "bf16 weights": (torch.bfloat16, False, 0.02),
}


def dense_columns(
    hidden: Tensor, targets: Tensor, head: Any, temperature: float, ref: PolicySnapshot, old: PolicySnapshot
) -> list[Tensor]:
    def logps(hidden: Tensor, head: Any) -> Tensor:
        return (head(hidden).to(torch.promote_types(hidden.dtype, torch.float32)) / temperature).log_softmax(-1)

    p = logps(hidden, head)
    with torch.no_grad():
        q, o = logps(*ref), logps(*old)
    return [
        p.gather(-1, targets[:, None])[:, 0],
        -(p.exp() * p).sum(-1),
        (p.exp() * (p - q)).sum(-1),
        (o.exp() * (o - p)).sum(-1),
    ]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", HEADS)
def test_values_and_gradients_in_chunks_are_those_of_the_whole(kind, precision, small_chunks):
    """With temperature and soft-capping, and gradients added up over two backward passes."""
    dtype, autocast, near = PRECISIONS[precision]
    results = []
    for chunked in (True, False):
        torch.manual_seed(1)
        projection = HEADS[kind]().to(dtype)
        head, other = OutputHead(projection, CAP), OutputHead(nn.Linear(H, V).to(dtype).requires_grad_(False), CAP)
        hidden = torch.randn(2, N, H, dtype=dtype).requires_grad_()
        values: list[Tensor] = []
        for part in range(2):
            targets, weights = torch.randint(V, (N,)), torch.randn(len(COLUMNS), N)
            ref, old = (PolicySnapshot(torch.randn(N, H, dtype=dtype), other) for _ in range(2))
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                if chunked:
                    found = token_statistics(
                        hidden[part], targets, head, vocab_size=V, temperature=0.7, entropy=True, ref=ref, old=old
                    )
                    columns = [getattr(found, name) for name in COLUMNS]
                else:
                    columns = dense_columns(hidden[part], targets, head, 0.7, ref, old)
            sum((w * column).sum() for w, column in zip(weights, columns, strict=True)).backward()
            values += [column.detach() for column in columns]
        results.append([*values, hidden.grad, *(p.grad for p in projection.parameters() if p.requires_grad)])
    for mine, dense in zip(*results, strict=True):
        assert (mine - dense).double().norm() <= near * dense.double().norm()


def test_the_gradient_is_the_finite_difference_also_where_some_or_all_of_it_is_cut_off(small_chunks):
    head = nn.Linear(3, 11).double()
    hidden, targets = torch.randn(7, 3, dtype=torch.float64, requires_grad=True), torch.randint(11, (7,))
    snapshot = PolicySnapshot(torch.randn(7, 3, dtype=torch.float64), nn.Linear(3, 11).double())

    def columns(hidden: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        found = token_statistics(hidden, targets, head, vocab_size=50, entropy=True, ref=snapshot, old=snapshot)
        return tuple(getattr(found, name) for name in COLUMNS)

    assert torch.autograd.gradcheck(columns, (hidden, head.weight, head.bias), check_undefined_grad=True)


def test_a_head_in_half_precision_does_not_lose_the_chunks_it_adds_up(monkeypatch):
    """200 chunks: added up in bf16 they are 1.5 % off."""
    head = nn.Linear(H, V, bias=False).bfloat16()
    hidden, targets = torch.randn(2000, H).bfloat16(), torch.randint(V, (2000,))
    wide = copy.deepcopy(head).float()
    wide(hidden.float()).log_softmax(-1).gather(-1, targets[:, None]).mean().backward()
    monkeypatch.setattr(exact_kl, "CHUNK_ELEMENTS", V * 10)
    token_statistics(hidden.requires_grad_(), targets, head, vocab_size=V).logp.mean().backward()
    assert head.weight.grad.dtype == torch.bfloat16
    assert (head.weight.grad.float() - wide.weight.grad).norm() < 4e-3 * wide.weight.grad.norm()


def test_a_trained_parameter_that_the_head_does_not_use_is_left_alone(small_chunks):
    head = nn.Linear(H, V)
    head.spare = nn.Parameter(torch.ones(1))
    token_statistics(torch.randn(9, H), torch.zeros(9, dtype=torch.long), head, vocab_size=V).logp.sum().backward()
    assert head.weight.grad.abs().sum() > 0 and not head.spare.grad


# -- heads and embeddings with adapters, in the trainer ----------------------------------------------------------------

QV = ["q_proj", "v_proj"]


def tied() -> Any:
    return tiny.llama(tie_word_embeddings=True)


def on(*modules: str, **more: Any) -> dict[str, Any]:
    return {"peft_config": tiny.lora(target_modules=[*QV, *modules], **more)}


ADAPTED: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Any]]]] = {
    "the head alone": (tiny.llama, lambda: {"peft_config": tiny.lora(target_modules=["lm_head"])}),
    "the head, soft-capped": (tiny.gemma2, lambda: on("lm_head")),
    "the head, tied": (tied, lambda: on("lm_head")),
    "the head, DoRA": (tiny.llama, lambda: on("lm_head", use_dora=True)),
    "the head in full, tied": (tied, lambda: on(modules_to_save=["lm_head", "embed_tokens"])),
    "embeddings, tied": (tied, lambda: on("embed_tokens")),
    "a few tokens": (tiny.llama, lambda: on(trainable_token_indices=[5, 6, 7])),
    "a few tokens, tied": (tied, lambda: on(trainable_token_indices=[5, 6, 7])),
    "came with it on the head": (
        lambda: get_peft_model(tiny.llama(), on("lm_head")["peft_config"]), lambda: {"peft_config": None},
    ),
    "everything, tied": (tied, lambda: {"peft_config": None}),
}  # fmt: skip
ANCHORED = {
    "kl_estimator": "exact",
    "kl_placement": "both",
    "kl_coef": 0.3,
    "trust_coef": 0.5,
    "clip_rule": "none",
    "temperature": 0.7,
    "num_mini_batches": 1,
    "max_grad_norm": None,
    "learning_rate": 1e-2,
}


def before_the_first_step(trainer: Any) -> Batch:
    """The batch of the first update, at which every ratio is 1 and every KL 0 to the bit."""
    trainer._loop.begin()
    batch = trainer.advantages(trainer.score(trainer.rollout(trainer.next_prompts())))
    measured = trainer.measure(batch)
    assert measured.kl == measured.kl_max == measured.tv == 0.0 and measured.max_ratio == 1.0
    assert set(measured.ratio_quantiles.values()) == {1.0}
    assert not batch.scored.ref_kl.any()
    return batch


def dense_loss(trainer: Any, batch: Batch, old: list[Tensor], ref: list[Tensor]) -> Tensor:
    """The policy's loss of the whole batch, from the model's whole forward pass, in float64 after its logits."""
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
def test_an_adapter_on_the_head_or_the_embeddings_gets_its_whole_gradient(kind, tmp_path, small_chunks):
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


# -- families ----------------------------------------------------------------------------------------------------------

LIMIT = 2e-4
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen3": {"head_dim": 8},
    "Gemma3Text": {
        "head_dim": 8, "final_logit_softcapping": 2.0, "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "GPTNeoX": {},
    "Phi": {},
    "Mistral": {"sliding_window": 4},
    "OPT": {"ffn_dim": 64, "word_embed_proj_dim": 16},
    "Bloom": {"n_layer": 2, "n_head": 4},
    "Falcon": {"alibi": True},
    "Granite": {"logits_scaling": 3.0},
    "Cohere": {"logit_scale": 0.4},
    "Olmo2": {},
    "Mixtral": MOE,
    "Qwen3Moe": MOE | {"head_dim": 8, "moe_intermediate_size": 16},
}  # fmt: skip


def family(name: str, **changes: Any) -> Any:
    common = tiny.llama().config.to_dict()
    keys = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    keys += ("bos_token_id", "eos_token_id", "initializer_range")
    keys += () if name in ("GPTNeoX", "Falcon") else ("num_key_value_heads",)
    keys += () if name == "OPT" else ("intermediate_size",)
    # A padding token that is sampled has an embedding of exactly 0, from which a Gemma moves in jumps.
    settings = {key: common[key] for key in keys} | {"pad_token_id": None} | FAMILIES.get(name, {}) | changes
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**settings))


@pytest.mark.parametrize("peft", [True, False], ids=["LoRA", "full"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_starts_at_ratio_1_is_measured_without_padding_and_moves(name, peft, tmp_path):
    changes = ANCHORED | {"learning_rate": 1e-2, "trust_max_kl": LIMIT}
    trainer = tiny.trainer(tmp_path, family(name), changes=changes, **({} if peft else {"peft_config": None}))
    assert trainer.model.split_lm.chunked
    batch = before_the_first_step(trainer)
    policy, scored = trainer.model.policy, batch.scored

    def alone() -> list[Tensor]:
        """log π over the vocabulary of each response, one row at a time and without padding."""
        found = []
        for micro in scored.micro_batches:
            for ids, mask, response in zip(micro.input_ids, micro.attention_mask, micro.response_mask, strict=True):
                with torch.no_grad():
                    logits = policy(input_ids=ids[mask.bool()][None]).logits[0, -int(response.sum()) - 1 : -1]
                found.append((logits.double() / 0.7).log_softmax(-1))
        return found

    old = alone()
    order = torch.cat([micro.rows for micro in scored.micro_batches])
    for row, p in zip(order, old, strict=True):
        mask = scored.rollout.response_mask[row]
        logp = p.gather(-1, scored.rollout.response_ids[row][mask][:, None])[:, 0]
        torch.testing.assert_close(scored.logp[row][mask].double(), logp, rtol=0, atol=1e-4)
    assert trainer.optimise(batch).refused is None
    proposed = trainer.measure(batch)
    measured = trainer.enforce(batch, proposed)
    dense = torch.cat([dense_kl(p, q) for p, q in zip(old, alone(), strict=True)]).mean()
    assert 0 < measured.kl <= LIMIT < proposed.kl and measured.kl == pytest.approx(float(dense), rel=0.01, abs=1e-6)


NOISY: dict[str, dict[str, Any]] = {
    "Mixtral": {"router_jitter_noise": 0.3},
    "OPT": {"layerdrop": 0.9},
    "Falcon": {"hidden_dropout": 0.3},  # read from the configuration in every pass
}  # fmt: skip


@pytest.mark.parametrize("name", ["Mixtral", "OPT"])
def test_the_noise_of_training_is_off(name, tmp_path):
    model = family(name, **NOISY[name])
    ids = torch.arange(1, 9)[None]
    assert any(not torch.equal(model.train()(ids).logits, model(ids).logits) for _ in range(9)), "there must be noise"
    trainer = tiny.trainer(tmp_path, model, peft_config=None, changes={"max_steps": 1})
    before_the_first_step(trainer)


def test_noise_that_cannot_be_switched_off_is_refused(tmp_path):
    with pytest.raises(ModelError, match="two passes over the same tokens differ"):
        tiny.trainer(tmp_path, family("Falcon", **NOISY["Falcon"]), peft_config=None)


def test_a_soft_cap_by_an_unknown_name_is_noticed_while_logits_are_small():
    class Capped(type(tiny.llama())):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = 30 * torch.tanh(out.logits / 30)
            return out

    model = Capped(tiny.llama(initializer_range=0.05).config)
    model.load_state_dict(tiny.llama(initializer_range=0.05).state_dict())
    ids = torch.arange(1, 5)[None]
    plain = super(Capped, model).forward(input_ids=ids).logits
    assert plain.abs().max() > 0.5 and (model(input_ids=ids).logits - plain).abs().max() < 1e-3
    assert not SplitLM(model).chunked


# -- tokenizers and vocabularies ---------------------------------------------------------------------------------------


def test_a_padding_token_without_an_embedding_changes_no_number(tmp_path):
    """TRL's scripts add one and leave the model as it is."""
    tokenizer, runs = tiny.tokenizer(pad=False), []
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    assert tokenizer.pad_token_id == tiny.VOCAB
    for name, each in (("new", tokenizer), ("own", tiny.tokenizer())):
        trainer = tiny.trainer(tmp_path / name, processing_class=each, changes={"max_steps": 1, "response_length": 12})
        batch = before_the_first_step(trainer)
        assert not batch.scored.rollout.response_mask.all(), "there must be something to pad"
        runs.append(batch)
    assert torch.equal(runs[0].scored.rollout.response_mask, runs[1].scored.rollout.response_mask)
    assert torch.equal(runs[0].scored.logp, runs[1].scored.logp)


def test_a_sampled_token_that_the_reward_model_does_not_know_is_named(tmp_path):
    """A vocabulary padded beyond the tokenizer, as many are, and a reward model that is not."""
    policy = tiny.llama(vocab_size=tiny.VOCAB + 200)
    trainer = tiny.trainer(tmp_path, policy, reward_funcs=tiny.scalar_model(tiny.llama()), changes={"max_steps": 1})
    with pytest.raises(RewardError, match=f"0 to {tiny.VOCAB - 1}") as error:
        trainer.train()
    assert "reward_processing_classes" in str(error.value)


# -- a record, recomputed from docs/metrics.md -------------------------------------------------------------------------


class Witness(TrustKLPPOTrainer):
    """Keeps the policy in float64 at every moment that a record speaks of, and checks the record against them."""

    def rollout(self, prompts: Any) -> Any:
        self.old = copy.deepcopy(self.model).double()
        return super().rollout(prompts)

    def advantages(self, scored: Scored) -> Batch:
        self.batch = super().advantages(scored)
        return self.batch

    def optimise(self, batch: Batch) -> Any:
        self.steps: list[tuple[nn.Module, Tensor]] = []
        backward = self.parts.optimisation._backward

        def kept(batch: Batch, mini: list[int], *rest: Any) -> Tensor:
            rows = torch.cat([batch.scored.micro_batches[index].rows for index in mini])
            self.steps.append((copy.deepcopy(self.model).double(), rows))
            return backward(batch, mini, *rest)

        self.parts.optimisation._backward = kept
        stats = super().optimise(batch)
        del self.parts.optimisation._backward
        self.proposed = copy.deepcopy(self.model).double()
        return stats

    def record(self, *args: Any) -> BoundRecord:
        record = super().record(*args)
        for key, value in recomputed(self).items():
            found = record
            for part in key.split("/"):
                found = found[part] if isinstance(found, dict) else getattr(found, part)
            expected = None if value is None else pytest.approx(float(value), rel=3e-4, abs=2e-5)
            assert found == expected, f"{key} of update {record.update}"
        self.seen.append(record)
        return record


def one_distribution(model: nn.Module, prompt: Tensor, response: Tensor, temperature: float) -> Tensor:
    logits = model(input_ids=torch.cat([prompt, response])[None]).logits[0]
    return (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)


ESTIMATES: dict[str, Callable[[Tensor], Tensor]] = {  # of log u, u = π_ref/π
    "k1": lambda x: -x,
    "k3": lambda x: x.exp() - 1 - x,
}
RULES: dict[str, Callable[..., Tensor]] = {
    "ppo": lambda w, a, low, high: torch.min(w * a, w.clamp(1 - low, 1 + high) * a),
    "spo": lambda w, a, low, high: w * a - a.abs() * (w - 1) ** 2 / (2 * torch.where(a > 0, high, low)),
    "cispo": lambda w, a, low, high: w.detach().clamp(1 - low, 1 + high) * a * w.log(),
}


def recomputed(t: Witness) -> dict[str, Any]:
    """The numbers of a record by their definitions, in float64 and row by row, from whole forward passes without padding."""
    args, rollout, scores = t.args, t.batch.scored.rollout, t.batch.scored.scores.double()
    prompts = [ids[mask] for ids, mask in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)]
    responses = [ids[mask] for ids, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)]
    rows, width = len(responses), rollout.response_ids.shape[1]

    def distributions(model: nn.Module, which: Any = range(rows)) -> list[Tensor]:
        return [one_distribution(model, prompts[i], responses[i], args.temperature) for i in which]

    with torch.no_grad():
        old, new, proposed = (distributions(m.policy) for m in (t.old, copy.deepcopy(t.model).double(), t.proposed))
        if t.is_peft_model:
            with t.old.policy.disable_adapter():
                ref = distributions(t.old.policy)
        else:
            ref = distributions(copy.deepcopy(t.reference.model).double())
        states = [
            t.old.policy(input_ids=torch.cat(pair)[None], output_hidden_states=True).hidden_states[-1][0]
            for pair in zip(prompts, responses, strict=True)
        ]
    at = [torch.arange(len(r)) for r in responses]
    old_logp = [p[i, r] for p, i, r in zip(old, at, responses, strict=True)]
    log_u = [q[i, r] - p for q, i, r, p in zip(ref, at, responses, old_logp, strict=True)]
    contexts = [dense_kl(p, q) for p, q in zip(old, ref, strict=True)]
    estimates = contexts if args.kl_estimator == "exact" else [ESTIMATES[args.kl_estimator](x) for x in log_u]
    per_response = torch.stack([each.sum() for each in contexts])
    kls = torch.cat([dense_kl(p, q) for p, q in zip(old, new, strict=True)])
    ratios = torch.cat([q[i, r] - p for q, i, r, p in zip(new, at, responses, old_logp, strict=True)]).exp()
    advantages, explained, share, spread = advantages_by_hand(t, prompts, responses, states, estimates, width)
    out = {
        "score": scores[~scores.isnan()].mean(),
        "length": sum(map(len, responses)) / rows,
        "eos_rate": sum(int(r[-1]) == EOS for r in responses) / rows,
        "entropy": torch.cat([-(p.exp() * p).sum(-1) for p in old]).mean(),
        "anchor/kl": torch.stack([each.sum() for each in estimates]).mean(),
        "anchor/kl_exact": per_response.mean(),
        "anchor/kl_stderr": per_response.std() / math.sqrt(rows),
        "anchor/share": share,
        "trust/kl": kls.mean(),
        "trust/kl_max": kls.max(),
        "trust/kl_proposed": torch.cat([dense_kl(p, q) for p, q in zip(old, proposed, strict=True)]).mean(),
        "trust/tv": torch.cat([(p.exp() - q.exp()).abs().sum(-1) / 2 for p, q in zip(old, new, strict=True)]).mean(),
        "trust/max_ratio": ratios.max(),
        "trust/ratio_quantiles/0.25": ratios.log().quantile(0.25).exp(),
        "trust/ratio_quantiles/0.95": ratios.log().quantile(0.95).exp(),
        "trust/epochs": len(t.steps) / args.num_mini_batches,
        "value/explained_variance": explained,
        "sampler/kl": 0.0,
    }
    return out | steps_by_hand(t, distributions, responses, advantages, old, ref, spread)


def steps_by_hand(
    t: Witness,
    distributions: Callable[..., list[Tensor]],
    responses: list[Tensor],
    advantages: Any,
    old: list[Tensor],
    ref: list[Tensor],
    spread: float,
) -> dict[str, Any]:
    """What the clip rule took of the gradient, and the gradient's norm, of each step at the weights it was made from."""
    args, scores = t.args, t.batch.scored.scores
    at = [torch.arange(len(r)) for r in responses]
    old_logp = [p[i, r] for p, i, r in zip(old, at, responses, strict=True)]
    weights, gated, low, norms = 0.0, 0.0, 0.0, []
    for model, which in t.steps:
        found = distributions(model.policy, which)
        loss, count = 0.0, 0
        for p, i in zip(found, which.tolist(), strict=True):
            if scores[i].isnan():
                continue
            w, a = (p[at[i], responses[i]] - old_logp[i]).exp(), advantages[i]
            leaf = w.detach().requires_grad_()
            ends = torch.tensor([args.low, args.high], dtype=w.dtype)
            slope = torch.autograd.grad(RULES[args.clip_rule](leaf, a, *ends).sum(), leaf)[0]
            removed = torch.where(a == 0, 0.0, (1 - slope / torch.where(a == 0, 1.0, a)).clamp(0, 1))
            weight = leaf.detach() * a.abs()
            weights, gated = weights + weight.sum(), gated + (removed * weight).sum()
            low += (removed * weight)[leaf < 1].sum()
            loss = loss - RULES[args.clip_rule](w, a, *ends).sum() + t.batch.trust_coef * dense_kl(old[i], p).sum()
            if args.anchor_in_loss:
                loss = loss + t.batch.anchor.coef * spread * dense_kl(p, ref[i]).sum()
            count += len(w)
        grads = torch.autograd.grad(loss / count, trainable(model.policy))
        norms.append(float(torch.cat([g.flatten() for g in grads]).norm()))
    limit = args.max_grad_norm or math.inf
    return {
        "trust/gated": gated / weights,
        "trust/gated_low": low / weights,
        "trust/gated_high": (gated - low) / weights,
        "gradient/norm": sum(norms) / len(norms),
        "gradient/scale": sum(min(1.0, limit / norm) for norm in norms) / len(norms),
    }


def advantages_by_hand(
    t: Witness,
    prompts: list[Tensor],
    responses: list[Tensor],
    states: list[Tensor],
    estimates: list[Tensor],
    width: int,
) -> tuple[list[Tensor], Any, Any, float]:
    """Advantages of each response, the explained variance, the anchor's share, and what whitening divided by."""
    args, scores, coef = t.args, t.batch.scored.scores.double(), t.batch.anchor.coef
    linear = t.old.value.linear
    counted = [i for i in range(len(responses)) if not scores[i].isnan()]
    whole: dict[int, Tensor] = {}
    pull: dict[int, Tensor] = {}
    errors, returns = [], []
    for i in counted:
        length, first = len(responses[i]), len(prompts[i]) - 1
        end = min(length, width - 1) if args.score_position == "after_eos" else length - 1
        steps = max(length, end + 1)
        value = torch.zeros(steps + 1, dtype=torch.float64)
        value[:steps] = (states[i][first : first + steps] @ linear.weight[0] + linear.bias).detach()
        paid = torch.zeros(steps, dtype=torch.float64)
        if args.kl_placement != "loss":
            moved = estimates[i][1:] if args.kl_estimator == "exact" else estimates[i]
            paid[: len(moved)] -= coef * moved
        reward = paid.clone()
        reward[end] += scores[i]
        errors_of = reward + args.gamma * value[1:] - value[:-1]
        decay = args.gamma * args.lam
        total = torch.stack([sum(decay ** (k - s) * errors_of[k] for k in range(s, steps)) for s in range(steps)])
        part = torch.stack([sum(decay ** (k - s) * paid[k] for k in range(s, steps)) for s in range(steps)])
        returns.append(total + value[:-1])
        errors.append(total)
        whole[i], pull[i] = total[:length], part[:length]
    means = [
        torch.stack([p[s] for p in pull.values() if len(p) > s]).mean() for s in range(max(map(len, pull.values())))
    ]
    anchor = torch.cat([p - torch.stack(means[: len(p)]) for p in pull.values()])
    everything = torch.cat([*whole.values()])
    both = anchor.abs().sum() + (everything - anchor).abs().sum()
    share = None if args.kl_placement == "loss" else anchor.abs().sum() / both
    explained = 1 - torch.cat(errors).var() / torch.cat(returns).var()
    mean, spread = everything.mean(), torch.sqrt(everything.var() + 1e-8)
    if not args.whiten_advantages:
        mean, spread = torch.zeros(()), torch.ones(())
    return (
        [(whole[i] - mean) / spread if i in whole else torch.zeros(0) for i in range(len(responses))],
        explained,
        share,
        float(1 / spread),
    )


def some_rewards(prompts: list, completions: list, **_: Any) -> list[float | None]:
    return [None if i % 3 == 1 else s for i, s in enumerate(tiny.good_words(prompts, completions))]


RECORDED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "k1, ppo, LoRA": ({"temperature": 0.7, "kl_coef": 0.1}, {}),
    "k3, cispo, full, unwhitened": (
        {"clip_rule": "cispo", "kl_estimator": "k3", "whiten_advantages": False, "learning_rate": 3e-3, "gamma": 0.9},
        {"peft_config": None},
    ),
    "exact, spo, penalty and limit, some rewards": (
        {
            "clip_rule": "spo", "kl_estimator": "exact", "kl_placement": "both", "kl_coef": 0.1, "trust_coef": 0.5,
            "trust_max_kl": 5e-3, "temperature": 1.3, "max_grad_norm": 0.3, "score_position": "eos",
        },
        {"reward_funcs": some_rewards},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RECORDED)
def test_every_number_of_a_record_is_what_its_definition_gives(case, tmp_path):
    changes, arguments = RECORDED[case]
    settings = {"learning_rate": 2e-2, "max_steps": 2, "response_length": 7} | changes
    given = {"reward_funcs": tiny.good_words, "peft_config": tiny.lora(), "train_dataset": tiny.prompts()} | arguments
    trainer = Witness(
        args=tiny.config(tmp_path, **settings), model=tiny.llama(), processing_class=tiny.tokenizer(), **given
    )
    trainer.seen = []
    trainer.train()
    assert len(trainer.seen) == 2 and trainer.seen[1].anchor.kl_exact > 1e-3
    assert any(record.trust.gated > 0.01 for record in trainer.seen), "nothing was gated, or nothing was compared"


def test_a_single_response_has_no_standard_error(tmp_path):
    changes = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "num_mini_batches": 1,
        "max_steps": 2,
    }
    tiny.trainer(tmp_path, changes=changes | {"response_length": 1, "whiten_rewards": True}).train()
    for record in load_records(tmp_path):
        assert record["anchor"]["kl_stderr"] is None and record["anchor"]["kl_exact"] is not None
        assert record["refused"] is None


# -- prompts of every length -------------------------------------------------------------------------------------------


def test_prompts_from_one_token_to_the_whole_context_share_a_batch(tmp_path):
    lengths = [1, 122, 3, 60, 1, 2, 122, 1]  # 6 more tokens fill a context of 128
    dataset = Dataset.from_dict({"prompt": [" ".join(["w1"] * length) for length in lengths]})
    trainer = tiny.trainer(tmp_path, train_dataset=dataset, changes={"max_steps": 1})
    scored = before_the_first_step(trainer).scored
    for row in range(len(lengths)):
        rollout = scored.rollout
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
        response = rollout.response_ids[row][rollout.response_mask[row]]
        with torch.no_grad():
            p = one_distribution(trainer.model.policy, prompt, response, 1.0)
        expected = p.gather(-1, response[:, None])[:, 0]
        torch.testing.assert_close(scored.logp[row][: len(response)], expected, rtol=0, atol=1e-4)
