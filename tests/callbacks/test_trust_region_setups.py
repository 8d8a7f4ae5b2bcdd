"""`TrustRegionCallback` in the set-ups in which GRPO and RLOO are run: it works, or says what to change.

Each row of the table in docs/grpo.md is a test here. In the set-ups that work, no generation batch ends beyond the limit by a
witness in float64 (see dense_windows.py), and the records agree with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.trainer.grpo_trainer
from transformers import EarlyStoppingCallback, LlamaForCausalLM

from tests import stand_ins, tiny
from tests.end_to_end.dense_windows import Judge, LabelledGRPO, LabelledRLOO, Run, SetUp, assert_held, run, train
from tests.pages import table_rows
from tests.tiny import LIMIT
from tests.trl_trainers import KINDS, trainer_of
from tests.weights import same, trained_weights
from tests.windows import ROUNDING, kls, limited, records_of, saved
from trl_trustkl import AdaptiveKLCallback, TrustRegionCallback, load_records
from trl_trustkl.controllers import DualKL
from trl_trustkl.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore")

PAGE = (Path(__file__).parents[2] / "docs" / "grpo.md").read_text("utf-8")
ROWS = table_rows(PAGE, "set-up")
HALF = 0.05
"""How far a KL of a pass in fp16 may be from that of the witness, relative to it."""
LABELLED = {"grpo": LabelledGRPO, "rloo": LabelledRLOO}


def test_each_row_of_the_page_is_tested():
    source = Path(__file__).read_text("utf-8")
    tested = {*OF_GRPO, *(name.split(",")[0] for name in OF_BOTH), *re.findall(r'ROWS\["(\w+)"\]', source)}
    assert tested == set(ROWS)


# -- what reward functions, tools and environments do --------------------------------------------------------------------


def own_rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Responses of six tokens, of which the second is not the policy's."""
    ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
    generator = torch.Generator().manual_seed(trainer.state.global_step)
    words = [torch.randint(3, tiny.VOCAB, (5,), generator=generator).tolist() for _ in ids]
    return {
        "prompt_ids": ids, "completion_ids": [[*each, tiny.EOS] for each in words],
        "logprobs": [[0.0] * 6 for _ in ids], "env_mask": [[1, 0, 1, 1, 1, 1] for _ in ids],
    }  # fmt: skip


TOOL_TEMPLATE = (
    "{% for message in messages %}<bos> {{ message['role'] }} {{ message['content'] }}{% for call in message.tool_calls %}"
    " {{ call.function.name }} {{ call.function.arguments | tojson }}{% endfor %} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<bos> assistant{% endif %}"
)


def tool_tokenizer() -> Any:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    tokenizer.response_schema = {"type": "object"}
    return tokenizer


def parse_response(tokenizer: Any, ids: list[int], **_: Any) -> dict[str, Any]:
    """The message of a completion: one that has an even word calls the tool."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    calls = [{"type": "function", "function": {"name": "double", "arguments": {"number": 2}}}]
    return {"role": "assistant", "content": text} | ({"tool_calls": calls} if "w2" in text else {})


def double(number: int) -> int:
    """Doubles a number.

    Args:
        number: the number.

    Returns:
        Twice the number.
    """
    return 2 * number


class Counter:
    """An environment with the tool `double`, whose reward is the number of calls."""

    def reset(self, **_: Any) -> str:
        self.calls = 0
        return " w7"

    def double(self, number: int) -> int:
        """Doubles a number.

        Args:
            number: the number.

        Returns:
            Twice the number.
        """
        self.calls += 1
        return 2 * number

    def get_reward(self) -> float:
        return float(self.calls)


def word_count(completions: list[str], log_extra: Any, log_metric: Any, **_: Any) -> list[float]:
    log_extra("words", [len(text.split()) for text in completions])
    log_metric("longest", max(len(text.split()) for text in completions))
    return [len(text.split()) / 6 for text in completions]


def with_tools(**arguments: Any) -> SetUp:
    return SetUp(
        {"max_completion_length": 12}, data=partial(tiny.prompts, chat=True),
        arguments={"processing_class": tool_tokenizer(), **arguments},
    )  # fmt: skip


def wide(folder: Path) -> LlamaForCausalLM:
    """A policy whose passes in half precision are near those in float64."""
    return tiny.llama(hidden_size=64, initializer_range=0.1)


def adaptive(trainer: Any) -> AdaptiveKLCallback:
    return AdaptiveKLCallback(DualKL(coef=0.1, target=0.02, lr=0.3), trainer=trainer)


EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
OF_BOTH = {
    "IterableDataset": SetUp(data=lambda: tiny.prompts().to_iterable_dataset()),
    "log_completions": SetUp({"log_completions": True}),
    "eval_strategy": SetUp(EVALUATED, arguments={"eval_dataset": tiny.prompts(4)}),
    "AdaptiveKLCallback, before": SetUp({"beta": 0.1}, reference="base", before=(adaptive,)),
    "AdaptiveKLCallback, after": SetUp({"beta": 0.1}, reference="base", after=(adaptive,)),
    "num_iterations": SetUp({"num_iterations": 2, "max_steps": 6}),
    "steps_per_generation": SetUp({"steps_per_generation": 4, "max_steps": 6}),
    "use_liger_kernel": SetUp({"use_liger_kernel": True}),
}
OF_GRPO = {
    "rollout_func": SetUp(arguments={"rollout_func": own_rollout}),
    "tools": with_tools(tools=[double]),
    "environment_factory": with_tools(environment_factory=Counter, reward_funcs=None),
}


@pytest.fixture
def packages(monkeypatch) -> None:
    """Liger and a parser of tool calls."""
    stand_ins.use_liger(monkeypatch)
    monkeypatch.setattr(trl.trainer.grpo_trainer, "parse_response", parse_response)


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, kind) for name in OF_BOTH for kind in LABELLED), *((name, "grpo") for name in OF_GRPO)]
)
def test_a_setup_that_works(name, kind, tmp_path, packages):
    assert ROWS[name.split(",")[0]].startswith("works")
    setup = {**OF_BOTH, **OF_GRPO}[name]
    held = run(SetUp(**{**vars(setup), "kind": LABELLED[kind]}), tmp_path)
    assert_held(held)
    if name in ("rollout_func", "tools", "environment_factory"):
        outside = [each.rows["completion_mask"].bool() & ~each.counts for each in held.trainer.generations]
        assert any(tokens.any() for tokens in outside), "each token is the policy's"
    if name.startswith("AdaptiveKL"):
        coefs = [window.record["anchor"]["coef"] for window in held.windows]
        assert coefs == pytest.approx([log["kl/coef"] for log in held.trainer.state.log_history if "kl/coef" in log])
        assert len(set(coefs)) == len(coefs)
        assert {window.record["anchor"]["target_per_token"] for window in held.windows} == {0.02}
    if name == "use_liger_kernel":
        assert any(hasattr(module, "replaced") for module in held.trainer.model.modules())


@pytest.mark.slow
@KINDS
def test_continuous_batching(kind, tmp_path):
    assert ROWS["use_transformers_continuous_batching"].startswith("works")
    changes = {"use_transformers_continuous_batching": True, "max_steps": 3}
    assert_held(run(SetUp(changes, kind=LABELLED[kind]), tmp_path))


@pytest.mark.parametrize("adapter", [{"target_modules": ["q_proj", "v_proj"]}, None], ids=["adapter", "full"])
@KINDS
def test_a_vision_language_model_on_prompts_of_text(kind, adapter, tmp_path):
    tiny_vision = pytest.importorskip("tests.tiny_vision", reason="needs Pillow")
    assert "works on prompts of text" in ROWS["ProcessorMixin"]
    changes = {"learning_rate": 0.05 if adapter else 5e-3, "beta": 0.0}
    setup = SetUp(
        changes, kind=LABELLED[kind], model=lambda folder: tiny_vision.llava(), adapter=adapter,
        reference="base" if adapter else None, data=lambda: tiny_vision.prompts(images=False),
        arguments={"processing_class": tiny_vision.processor()},
    )  # fmt: skip
    assert_held(run(setup, tmp_path))


@KINDS
def test_images_are_rejected_before_the_first_rollout(kind, tmp_path):
    tiny_vision = pytest.importorskip("tests.tiny_vision", reason="needs Pillow")
    assert "is an error at construction" in ROWS["image"] == ROWS["images"]
    trainer = trainer_of(
        kind, tmp_path, model=tiny_vision.llava(), processing_class=tiny_vision.processor(), max_steps=1, beta=0.0,
        train_dataset=tiny_vision.prompts(images=True), peft_config=tiny.lora(target_modules=["q_proj"]),
    )  # fmt: skip
    with pytest.raises(ConfigError, match="`train_dataset` has the column 'image', with which this version of Trust"):
        TrustRegionCallback(trainer, max_kl=LIMIT)
    trainer.train()  # TRL can


# -- the reference ---------------------------------------------------------------------------------------------------------


def renewing(kind: str) -> Any:
    """A trainer that keeps the weights of its reference whenever it generates."""

    class Renewing(LABELLED[kind]):
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            if self.model.training:
                self.references = [*getattr(self, "references", []), [p.clone() for p in self.ref_model.parameters()]]
            return super()._generate_and_score_completions(inputs)

    return Renewing


@pytest.mark.parametrize("iterations", [1, 2])
@KINDS
def test_the_anchor_is_measured_to_the_renewed_reference(kind, iterations, tmp_path):
    assert ROWS["sync_ref_model"].startswith("works")

    def model(folder: Path) -> Any:
        tiny.llama().save_pretrained(folder / "policy")
        return LlamaForCausalLM.from_pretrained(folder / "policy")

    setup = SetUp(
        {
            "sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5, "beta": 0.1,
            "learning_rate": 5e-3, "max_steps": 6, "num_iterations": iterations,
        },
        kind=renewing(kind), model=model, adapter=None, reference="start", options={"max_kl": LIMIT, "every": "step"},
    )  # fmt: skip
    trainer, keeps = train(setup, tmp_path)
    judge = Judge(setup, tmp_path, trainer)
    windows = []
    for generation, reference, record in zip(
        trainer.generations, trainer.references, load_records(tmp_path), strict=True
    ):
        judge.start = reference
        windows.append(judge.window(generation, keeps, record))
    assert_held(Run(trainer, keeps, windows))
    first = [reference[0] for reference in trainer.references]
    changed = [not torch.equal(one, other) for one, other in pairwise(first)]
    assert changed == [(i + 1) * iterations % 2 == 0 for i in range(len(changed))]


# -- vLLM ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["colocate", "server"])
@pytest.mark.parametrize("iterations", [1, 2])
@KINDS
def test_vllm_gets_the_weights_after_enforcement(kind, iterations, mode, tmp_path, monkeypatch):
    """A stand-in for TRL's engine: TRL synchronises when it generates, after the step that ended the last window."""
    assert ROWS["use_vllm"].startswith("works")
    stand_ins.use_vllm(monkeypatch)
    changes = {"use_vllm": True, "vllm_mode": mode, "num_iterations": iterations, "max_steps": 4 * iterations}
    held = run(SetUp(changes, kind=LABELLED[kind]), tmp_path)
    assert_held(held)
    synced = [list(weights.values()) for weights in held.trainer.vllm_generation.synced]
    assert len(synced) == len(held.windows) == 4
    for weights, generation, window in zip(synced[1:], held.trainer.generations[1:], held.windows, strict=False):
        last = window.steps[-1]
        assert all(map(torch.equal, weights, held.keeps.kept[last])) and all(map(torch.equal, weights, generation.old))
        if window.record["trust"]["scale"] < 1:
            assert not all(map(torch.equal, weights, held.keeps.proposed[last])), "vLLM got the proposed policy"
    if kind == "grpo":
        name = "sampling/sampling_logp_difference/max"
        assert max(log[name] for log in held.trainer.state.log_history if name in log) < 1e-4


# -- transformers ----------------------------------------------------------------------------------------------------------


@KINDS
def test_the_best_model_of_a_run_that_stops_early_is_one_within_the_limit(kind, tmp_path):
    """The run ends in the middle of a window; the best checkpoint was saved in the middle of one or after one."""
    assert ROWS["load_best_model_at_end"].startswith("works") and ROWS["EarlyStoppingCallback"].startswith("works")
    trainer = limited(
        kind, tmp_path, witness=True, max_kl=LIMIT, num_iterations=2, max_steps=8, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_reward", greater_is_better=True,
        callbacks=[EarlyStoppingCallback(1)], **EVALUATED,
    )  # fmt: skip
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert trainer.state.global_step < 8, "nothing stopped the run"
    assert same(trained_weights(trainer.model), saved(best))
    for step in range(1, trainer.state.global_step + 1):
        batch = trainer.witness.batches[(step - 1) // 2]
        folder = tmp_path / f"checkpoint-{step}"
        assert float(kls(batch.rollout, batch.old, saved(folder)).mean()) <= LIMIT + ROUNDING
    proposed = [row["trust"]["kl_proposed"] for row in load_records(tmp_path)]
    assert max(proposed) > LIMIT


@KINDS
def test_a_search_of_hyperparameters_is_not_part_of_these_trainers(kind, tmp_path):
    assert ROWS["hyperparameter_search"] == ROWS["model_init"] and ROWS["model_init"].startswith("error of TRL")
    with pytest.raises(TypeError, match="model_init"):
        trainer_of(kind, tmp_path, model_init=tiny.llama)
    trainer = limited(kind, tmp_path, max_kl=LIMIT)
    with pytest.raises(RuntimeError, match="search"):
        trainer.hyperparameter_search(n_trials=1)


@pytest.fixture
def half(monkeypatch) -> Iterator[None]:
    """fp16 with a gradient scaler on a CPU, where accelerate makes none."""
    from accelerate import Accelerator

    build = Accelerator.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        self.state._mixed_precision, self.native_amp, self.scaler = "fp16", True, torch.amp.GradScaler("cpu")

    monkeypatch.setattr(Accelerator, "__init__", init)
    yield


@KINDS
def test_fp16(kind, tmp_path, half):
    assert ROWS["fp16"].startswith("works with `max_kl`")
    assert_held(run(SetUp({"fp16": True, "max_steps": 6}, kind=LABELLED[kind], model=wide), tmp_path), HALF)
    with pytest.raises(ConfigError, match="`stop` got 0.1 with fp16=True, where a step without gradients fails"):
        limited(kind, tmp_path, stop=0.1, num_iterations=2, fp16=True)


@KINDS
def test_a_step_that_fp16_skips_moves_nothing_and_leaves_the_learning_rate(kind, tmp_path, half):
    trainer = limited(kind, tmp_path, model=wide(tmp_path), max_kl=LIMIT, lr_target=LIMIT / 2, max_steps=6, fp16=True)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    rows = records_of(trainer)
    skipped = [row["trust"]["kl_proposed"] == 0 for row in rows]
    assert 1 <= sum(skipped) < 6, "nothing was skipped, or everything"
    rates = [row["lr"] for row in rows]
    assert all(rates[i + 1] == rates[i] for i in range(5) if skipped[i]) and len({*rates}) > 1


# -- the rows of completions -----------------------------------------------------------------------------------------------


@KINDS
def test_what_reward_functions_log_is_in_the_completions(kind, tmp_path):
    assert ROWS["log_extra"].startswith("works") and ROWS["log_metric"].startswith("works")
    trainer = limited(
        kind, tmp_path, max_kl=LIMIT, reward_funcs=[word_count, tiny.good_words], max_steps=3, **EVALUATED
    )
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert len(rows) == 3 * 8
    for row in rows:
        words = len(row["completion"].split())
        assert row["words"] == words and row["rewards"]["word_count"] == pytest.approx(words / 6)
        assert row["rewards"]["good_words"] == pytest.approx(tiny.good_words([], [row["completion"]])[0])
        assert row["score"] == pytest.approx(sum(row["rewards"].values()))
    assert "longest" in trainer.state.log_history[0]
