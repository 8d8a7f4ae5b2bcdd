"""KL(π_old‖π) of each generation batch of TRL's GRPO and RLOO trainers, computed again after a run: dense, in float64.

The trainers below label the rows that they generate, and keep their weights at that time and around each optimizer step.
The labels of the rows in a training pass tell which batch it uses. After the run, a new float64 model takes these weights,
and the divergences are computed from its complete logits.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from tests import sharded, tiny
from tests.dense import dense_kl
from tests.witness import in_float64
from trl_trustkl import BoundReportCallback, TrustRegionCallback, load_records

ROUNDING, SINGLE = 1e-6, 2e-5
"""How far a KL in float32 may be from the one computed here: in nats, and relative to it."""
COLUMNS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask")


@dataclass
class Generation:
    """A generation batch: its rows, the weights that generated it, and the optimizer steps with a pass on any of its rows.

    logps: TRL's log-probabilities of a row's completion, from the passes before any of these steps.
    """

    rows: dict[str, Tensor]
    old: list[Tensor]
    steps: list[int] = field(default_factory=list)
    logps: dict[int, Tensor] = field(default_factory=dict)

    @property
    def counts(self) -> Tensor:
        """The tokens that have a loss, [B, T]."""
        mask = self.rows["completion_mask"].bool()
        return mask & self.rows["tool_mask"].bool() if "tool_mask" in self.rows else mask


class Labelled:
    """A part of a trainer that keeps the generation batches of training and their use."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.generations: list[Generation] = []
        super().__init__(*args, **kwargs)

    def weights(self) -> list[Tensor]:
        return [sharded.whole(p) for p in self.model.parameters() if p.requires_grad]

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        old = self.weights()
        outputs = super()._generate_and_score_completions(inputs)
        if self.model.training:
            count = len(outputs["completion_ids"])
            outputs |= {"generation": torch.full((count,), len(self.generations)), "row": torch.arange(count)}
            rows = {name: outputs[name].clone() for name in COLUMNS if name in outputs}
            self.generations.append(Generation(rows, old))
        return outputs

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        self._label(inputs)
        return super()._compute_loss(model, inputs)

    def compute_liger_loss(self, model: Any, inputs: Any) -> Any:  # of GRPO, in TRL 1.12
        self._label(inputs)
        return super().compute_liger_loss(model, inputs)

    def _label(self, inputs: Any) -> None:
        if self.model.training:
            self.labels = list(zip(inputs["generation"].tolist(), inputs["row"].tolist(), strict=True))
            for index in {index for index, _ in self.labels}:
                if self.state.global_step not in self.generations[index].steps:
                    self.generations[index].steps.append(self.state.global_step)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if torch.is_grad_enabled():
            for (index, row), logps in zip(self.labels, found[0].detach(), strict=True):
                if len(self.generations[index].steps) == 1:
                    self.generations[index].logps[row] = logps
        return found


class LabelledGRPO(Labelled, GRPOTrainer):
    pass


class LabelledRLOO(Labelled, RLOOTrainer):
    pass


class WithTools(LabelledGRPO):
    """Takes every third token of a completion for the output of a tool, which has no loss."""

    def _generate(self, prompts: list[Any]) -> Any:
        prompt_ids, completion_ids, _, *others = super()._generate(prompts)
        mask = [[int(i % 3 != 1) for i in range(len(ids))] for ids in completion_ids]
        return prompt_ids, completion_ids, mask, *others


class KeepsWeights(TrainerCallback):
    """The weights that each optimizer step proposed, and those that were kept of it. It is added before other callbacks."""

    def __init__(self, trainer: Labelled) -> None:
        self.trainer = trainer
        self.proposed: list[list[Tensor]] = []
        self.kept: list[list[Tensor]] = []

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.proposed.append(self.trainer.weights())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.kept.append(self.trainer.weights())

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.kept[-1] = self.trainer.weights()  # a window that the end cuts off is enforced after on_step_end


@dataclass(frozen=True)
class SetUp:
    """What a run trains.

    Args:
        changes: of TRL's configuration.
        kind: the trainer. config: of its configuration, if that is another class.
        model: makes the policy, which may be saved under the given folder.
        adapter: changes of the LoRA configuration; None for no new adapter.
        data: makes the prompts.
        reference: what TRL's reference is: the policy without its adapter, the policy before training, or none.
        options: of the callback.
        arguments: further ones of the trainer.
        before, after: make the callbacks that are added before and after the TrustRegionCallback.
    """

    changes: dict[str, Any] = field(default_factory=dict)
    kind: type[Labelled] = LabelledGRPO
    model: Callable[[Path], nn.Module] = lambda folder: tiny.llama()
    adapter: dict[str, Any] | None = field(default_factory=dict)
    data: Callable[[], Dataset] = tiny.prompts
    reference: Literal["base", "start"] | None = "base"
    options: dict[str, Any] = field(default_factory=lambda: {"max_kl": tiny.LIMIT})
    arguments: dict[str, Any] = field(default_factory=dict)
    config: type | None = None
    before: tuple[Callable[[Any], TrainerCallback], ...] = ()
    after: tuple[Callable[[Any], TrainerCallback], ...] = ()

    def trainer(self, folder: Path) -> Any:
        settings = {
            "output_dir": str(folder),
            **tiny.GROUPS,
            "max_steps": 4,
            "learning_rate": 0.02,
            "lr_scheduler_type": "constant",
        }
        config: Any = self.config or (RLOOConfig if issubclass(self.kind, RLOOTrainer) else GRPOConfig)
        arguments = {
            "reward_funcs": tiny.good_words, "train_dataset": self.data(), "processing_class": tiny.tokenizer(),
            "peft_config": None if self.adapter is None else tiny.lora(**self.adapter),
        }  # fmt: skip
        args = config(**settings | self.changes)
        return self.kind(model=self.model(folder), args=args, **arguments | self.arguments)

    def witness(self, folder: Path) -> nn.Module:
        """The policy before training, in float64. It shares nothing with that of a trainer."""
        model = self.model(folder)
        return in_float64(model if self.adapter is None else get_peft_model(model, tiny.lora(**self.adapter))).eval()


class Window(NamedTuple):
    """A generation batch, by the witness.

    steps: the optimizer steps that used it. counts: its tokens that have a loss. kls: KL(π_old‖π) after each of these
    steps, in nats per token; proposed: after the last one, before enforcement. anchor: KL(π_old‖π_ref) in nats per
    response, exact and as estimated at the sampled tokens. difference: the largest of a log-probability from that of TRL,
    before the first step. record: that of the callback, empty without one. token, response, anchor_after: after the last
    step, the largest KL(π_old‖π) of a token and the largest sum over a response, and KL(π‖π_ref) in nats per response.
    """

    steps: list[int]
    counts: Tensor
    kls: list[float]
    proposed: float
    anchor: tuple[float, float] | None
    difference: float
    record: dict[str, Any]
    token: float
    response: float
    anchor_after: float | None

    @property
    def kl(self) -> float:
        """KL(π_old‖π) after the last step."""
        return self.kls[-1]


class Run(NamedTuple):
    trainer: Any
    keeps: KeepsWeights
    windows: list[Window]


def run(setup: SetUp, folder: Path, *, limited: bool = True) -> Run:
    """Train, with the callback if `limited`, and compute the divergences."""
    trainer, keeps = train(setup, folder, limited=limited)
    generations = [each for each in trainer.generations if each.steps]
    records = load_records(folder) if limited else [{}] * len(generations)
    judge = Judge(setup, folder, trainer)
    windows = [judge.window(each, keeps, record) for each, record in zip(generations, records, strict=True)]
    return Run(trainer, keeps, windows)


def train(setup: SetUp, folder: Path, *, limited: bool = True) -> tuple[Any, KeepsWeights]:
    """Train, with the callback if `limited`."""
    trainer = setup.trainer(folder)
    keeps = KeepsWeights(trainer)
    trainer.add_callback(keeps)
    for make in setup.before:
        trainer.add_callback(make(trainer))
    if limited:
        trainer.add_callback(BoundReportCallback(report=False))
        trainer.add_callback(TrustRegionCallback(trainer, **setup.options))
    for make in setup.after:
        trainer.add_callback(make(trainer))
    trainer.train()
    return trainer, keeps


class Judge:
    """Computes distributions over the complete vocabulary, with a float64 model that takes the weights of a trainer."""

    def __init__(self, setup: SetUp, folder: Path, trainer: Any) -> None:
        self.setup = setup
        self.temperature = trainer.args.temperature
        self.model = setup.witness(folder)
        own = dict(self.model.named_parameters())
        self.trained = [own[name] for name, p in trainer.model.named_parameters() if p.requires_grad]
        self.start = [p.clone() for p in self.trained]

    @torch.no_grad()
    def logps(self, weights: list[Tensor], rows: dict[str, Tensor]) -> Tensor:
        """log π over the vocabulary at each completion token, [B, T, V], and 0 at padding.

        TRL pads prompts on the left and gives no position ids, so that padding counts as positions. Here rows are padded on
        the right and have those positions.
        """
        for own, weight in zip(self.trained, weights, strict=True):
            own.copy_(weight)
        masks = torch.cat([rows["prompt_mask"], rows["completion_mask"]], 1).bool()
        texts = torch.cat([rows["prompt_ids"], rows["completion_ids"]], 1)
        ids = pad_sequence([text[mask] for text, mask in zip(texts, masks, strict=True)], batch_first=True)
        padding = (~rows["prompt_mask"].bool()).sum(1, keepdim=True)
        logits = self.model(input_ids=ids, position_ids=padding + torch.arange(ids.shape[1])).logits
        logps = (logits / self.temperature).log_softmax(-1)
        out = logps.new_zeros(*rows["completion_ids"].shape, logps.shape[-1])
        lengths = (rows[name].sum(1).tolist() for name in ("prompt_mask", "completion_mask"))
        for row, (prompt, completion) in enumerate(zip(*lengths, strict=True)):
            out[row, :completion] = logps[row, prompt - 1 : prompt - 1 + completion]
        return out

    def window(self, generation: Generation, keeps: KeepsWeights, record: dict[str, Any]) -> Window:
        """The divergences of a generation batch; NaN if none of its tokens has a loss."""
        rows, counts, steps = generation.rows, generation.counts, generation.steps
        old = self.logps(generation.old, rows)

        def kl(weights: list[Tensor]) -> float:
            return float(dense_kl(old, self.logps(weights, rows))[counts].mean())

        new = self.logps(keeps.kept[steps[-1]], rows)
        moved, after = dense_kl(old, new) * counts, self.anchor(new, rows, counts)

        sampled = old.gather(-1, rows["completion_ids"].unsqueeze(-1)).squeeze(-1)
        differences = [(logps - sampled[row])[counts[row]] for row, logps in generation.logps.items()]
        return Window(
            steps=steps,
            counts=counts,
            kls=[kl(keeps.kept[step]) for step in steps],
            proposed=kl(keeps.proposed[steps[-1]]),
            anchor=self.anchor(old, rows, counts),
            difference=max((float(each.abs().max()) for each in differences if len(each)), default=0.0),
            record=record,
            token=float(moved.max()),
            response=float(moved.sum(1).max()),
            anchor_after=None if after is None else after[0],
        )

    def anchor(self, old: Tensor, rows: dict[str, Tensor], counts: Tensor) -> tuple[float, float] | None:
        """KL(π_old‖π_ref) summed over a response: exact, and by k3 (GRPO) or k1 (RLOO) at the sampled tokens."""
        if self.setup.reference is None:
            return None
        with self.model.disable_adapter() if self.setup.reference == "base" else nullcontext():
            ref = self.logps(self.start, rows)
        ids = rows["completion_ids"].unsqueeze(-1)
        log_ratio = (ref.gather(-1, ids) - old.gather(-1, ids)).squeeze(-1)
        k1 = issubclass(self.setup.kind, RLOOTrainer)
        estimate = -log_ratio if k1 else log_ratio.exp() - 1 - log_ratio
        exact, sampled = (float((each * counts).sum(1).mean()) for each in (dense_kl(old, ref), estimate))
        return exact, sampled


def assert_held(held: Run, precision: float = SINGLE) -> None:
    """By the witness every batch is within the limit, most steps were shortened, and the records agree."""

    def near(value: float) -> Any:
        return pytest.approx(value, rel=precision, abs=ROUNDING)

    assert len(held.windows) >= 2
    for window in held.windows:
        trust, anchor = window.record["trust"], window.record["anchor"]
        assert window.kl <= tiny.LIMIT * (1 + precision) + ROUNDING and trust["kl"] <= tiny.LIMIT == trust["guaranteed"]
        assert trust["kl"] == near(window.kl) and trust["kl_proposed"] == near(window.proposed)
        if window.anchor is None:
            assert anchor["kl_exact"] is None
        else:
            assert anchor["kl_exact"] == near(window.anchor[0])
            assert anchor["kl"] == pytest.approx(window.anchor[1], rel=precision, abs=precision / 4)  # its terms cancel
    assert sum(window.record["trust"]["scale"] < 1 for window in held.windows) > len(held.windows) / 2
