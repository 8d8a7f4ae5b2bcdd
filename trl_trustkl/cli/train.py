"""`trustkl train`: a run from a YAML file and flags, with the options of TRL and of this package."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError, DataError
from ..files import create_folder

HELP = "train with PPO, GRPO or RLOO from a YAML file and flags, as `trl grpo` does"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds none: `run` reads them with TRL's parser, which takes seconds to import."""
    parser.set_defaults(run=run, parses_rest=True)


def run(options: argparse.Namespace) -> int:
    """Train, save, and print where the results are. Exit status: see `main`."""
    # Before any other import: bitsandbytes logs errors about optional kernels while it is imported.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from . import train_inputs, train_options

    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        asked = train_options.parse(options.rest)
        create_folder("output_dir", asked.training.output_dir)
        train_data, eval_data = train_inputs.load_datasets(asked)
        arguments = train_inputs.load_rewards(asked)
        if asked.script.trainer == "ppo":
            arguments |= train_inputs.load_models(asked)
            asked.training.model_init_kwargs = None  # the trainer gets loaded models
        else:
            arguments |= train_inputs.name_models(asked)
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
    """Run the trainer, save the model or adapter, and push it if `push_to_hub` is set."""
    from ..callbacks.bound_report import report_of
    from .progress import show_updates

    args = asked.training
    checkpoint, args.resume_from_checkpoint = args.resume_from_checkpoint, None  # the trainer would warn of it
    trainer = build(asked.script.trainer, args=args, **arguments)
    show_updates(trainer)
    args.resume_from_checkpoint = checkpoint  # a tracker may read it
    trainer.train(resume_from_checkpoint=_checkpoint(checkpoint, args.output_dir, asked.script.trainer))
    if trainer.state.global_step == 0:
        raise DataError("the run made no update; give more prompts, or a larger num_train_epochs or max_steps.")
    trainer.save_model(args.output_dir)
    if trainer.is_world_process_zero():
        report = report_of(trainer.callback_handler.callbacks)
        _conclude(args.output_dir, "adapter" if asked.model.use_peft else "model", report.rendered if report else None)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=asked.script.dataset_name)
        trainer.accelerator.print(f"Pushed:       https://huggingface.co/{trainer.hub_model_id}")
    accelerator = trainer.accelerator
    # Free the wrapped model before its process group. If the model holds the last reference to the group, PyTorch waits
    # indefinitely for a thread that needs Python's lock.
    del trainer
    accelerator.free_memory()
    accelerator.end_training()


def build(name: str, **arguments: Any) -> Any:
    """The trainer of that name. TRL's errors about its arguments are raised as ConfigError."""
    import trl_trustkl

    if name == "ppo":
        return trl_trustkl.TrustKLPPOTrainer(**arguments)
    try:
        return getattr(trl_trustkl, f"TrustKL{name.upper()}Trainer")(**arguments)
    except (ImportError, NotImplementedError, OSError, TypeError, ValueError) as error:
        raise ConfigError(f"TRL's {name.upper()} trainer rejects these options: {error}") from error


def _checkpoint(value: str | None, output_dir: str, trainer: str) -> str | bool | None:
    """`--resume_from_checkpoint True` means the newest checkpoint, as in TRL's scripts; transformers parses it as text.

    Raises CheckpointError for a folder that does not exist. PPO's trainer makes these checks itself.
    """
    from transformers.trainer_utils import get_last_checkpoint

    found = {"true": True, "false": None, "none": None}.get(str(value).lower(), value)
    if not found or trainer == "ppo":
        return found
    if found is True:
        if Path(output_dir).is_dir() and get_last_checkpoint(output_dir) is not None:
            return True
        print(
            f"`resume_from_checkpoint` got True; {output_dir} has no checkpoint: starting a new run.", file=sys.stderr
        )
        return None
    if not (Path(found) / "trainer_state.json").is_file():
        raise CheckpointError(f"`resume_from_checkpoint` got {found!r}, which is not a folder with a checkpoint.")
    return found


def _conclude(folder: str, kind: str, report: Path | None) -> None:
    from ..records import BOUNDS_FILE, COMPLETIONS_FILE

    print(f"Records:      {Path(folder) / BOUNDS_FILE}")
    print(f"Completions:  {Path(folder) / COMPLETIONS_FILE}")
    print(f"Report:       {report or f'none was rendered; trustkl report {folder} renders it, or names the cause'}")
    print(f"{kind.capitalize() + ':':13} {folder}")


def _terminate(number: int, frame: Any) -> None:
    """SIGTERM ends the run as Ctrl-C does, through every `finally`, with the exit status that a shell reports: 143."""
    print("trustkl train: terminated; the records of finished updates are kept.", file=sys.stderr)
    sys.exit(128 + number)
