"""`trustkl train`: a run from a YAML file and flags, with TRL's options and this project's."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from pathlib import Path
from typing import Any

from ..errors import ConfigError

HELP = "train with PPO from a YAML file and flags, as `trl sft` does"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None here: TRL's parser, which takes seconds to import, reads them in `run`."""
    parser.set_defaults(run=run, parses_rest=True)


def run(options: argparse.Namespace) -> int:
    """Train, save, say where things are. Exit status: see `main`."""
    # First of all: it speaks up while it is imported, of kernels that it does not need.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from . import train_inputs, train_options

    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        asked = train_options.parse(options.rest)
        train_data, eval_data = train_inputs.load_datasets(asked)
        arguments = {**train_inputs.load_rewards(asked), **train_inputs.load_models(asked)}
        train(asked, train_dataset=train_data, eval_dataset=eval_data, **arguments)
    except ConfigError as error:
        print(f"trustkl train: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("trustkl train: stopped; the records of finished updates are kept.", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0


def train(asked: Any, **arguments: Any) -> None:
    """Run the trainer, save the model or adapter, push it where that was asked for."""
    from ..ppo.trainer import TrustKLPPOTrainer

    args = asked.training
    trainer = TrustKLPPOTrainer(args=args, **arguments)
    trainer.train(resume_from_checkpoint=_checkpoint(args.resume_from_checkpoint))
    trainer.save_model(args.output_dir)
    if trainer.is_world_process_zero():
        _conclude(args.output_dir, "adapter" if asked.model.use_peft else "model", _rendered(trainer))
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=asked.script.dataset_name)
        trainer.accelerator.print(f"Pushed:       https://huggingface.co/{trainer.hub_model_id}")
    accelerator = trainer.accelerator
    # The wrapped model goes before its process group: where it is the last to hold that, PyTorch waits for a thread that
    # waits for Python, for ever.
    del trainer
    accelerator.free_memory()
    accelerator.end_training()


def _checkpoint(value: str | None) -> str | bool | None:
    """`--resume_from_checkpoint True` asks for the newest checkpoint, as in TRL's scripts; transformers reads it as text."""
    return {"true": True, "false": None, "none": None}.get(str(value).lower(), value)


def _rendered(trainer: Any) -> Path | None:
    """The page that the trainer's own callback wrote at the end, or None where it could not."""
    from ..callbacks.bound_report import report_of

    report = report_of(trainer.callback_handler.callbacks)
    return None if report is None else report.rendered


def _conclude(folder: str, kind: str, report: Path | None) -> None:
    from ..records import BOUNDS_FILE, COMPLETIONS_FILE

    print(f"Records:      {Path(folder) / BOUNDS_FILE}")
    print(f"Completions:  {Path(folder) / COMPLETIONS_FILE}")
    print(f"Report:       {report or f'none was rendered; trustkl report {folder} makes it, or says what it needs'}")
    print(f"{kind.capitalize() + ':':13} {folder}")


def _terminate(number: int, frame: Any) -> None:
    """SIGTERM ends the run as Ctrl-C does, through every `finally`; 143 is what a shell shows for it."""
    print("trustkl train: terminated; the records of finished updates are kept.", file=sys.stderr)
    sys.exit(128 + number)
