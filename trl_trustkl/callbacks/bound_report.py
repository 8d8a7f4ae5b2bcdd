"""BoundReportCallback: writes the records of a run, renders its report, and prints a table."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from .. import records
from ..errors import ConfigError, out_of_range
from ..files import write_atomically
from ..records import BoundRecord
from ..report import MissingPackageError, render_report
from ..report.text import visible
from ..trl_compat import trl_logs
from ..trust.gradient_scale import rescales_gradients
from .settings import settings_of
from .table import HEADER, line, printer

logger = logging.get_logger(__name__)


class BoundReportCallback(TrainerCallback):
    """Writes the records of a run into its folder, renders its report, and prints a line for each update.

    `bounds.jsonl` gets a line for every update, `completions.jsonl` the completions, and `run_settings.json` the model, the
    versions of the libraries, the hardware and all options of the run. Each line is passed to the operating system before the
    next update begins: a killed run keeps every finished update. Files of an earlier run in the same folder are moved aside,
    never appended to; a resumed run drops the lines after its checkpoint and continues from there. The trainer adds this
    callback by default; another instance replaces it. Only the first process writes, renders and prints, and the time for it
    is not part of a record's `seconds`.

    Args:
        report: whether `report.html` and `figures` are rendered when training ends, also when it is stopped early; None:
            if the packages of the extra `report` are installed. A report that cannot be rendered never ends a run: it
            is logged as a warning once, if the report was requested.
        report_every: the number of updates after which the report is also rendered during training; None: only at the end.
        table: whether a line for each update is printed, within 80 columns; None: only in a terminal, and only if
            `disable_tqdm` turns TRL's progress bar off.

    `rendered` is the page that was last written in this run, or None.

    Raises ConfigError for a value of the wrong type or range, and SaveError during a run if a record cannot be written.
    """

    def __init__(
        self, *, report: bool | None = None, report_every: int | None = None, table: bool | None = None
    ) -> None:
        for name, value in (("report", report), ("table", table)):
            if value is not None and not isinstance(value, bool):
                raise out_of_range(name, value, "True, False or None")
        if report_every is not None and (
            isinstance(report_every, bool) or not isinstance(report_every, int) or report_every < 1
        ):
            raise out_of_range("report_every", report_every, "a number of updates >= 1, or None")
        if report_every is not None and report is False:
            raise ConfigError(
                f"`report_every` got {report_every} with report=False, which renders no report; leave one of them None."
            )
        self.report = report
        self.report_every = report_every
        self.table = table
        self.rendered: Path | None = None
        self._warned = False
        self._shown = False
        self._reads_logs = True

    def take_records(self) -> Callable[[], None]:
        """Make no records from the logs of TRL's trainers, because a callback such as TrustRegionCallback passes its own, until
        the returned function is called."""
        self._reads_logs = False
        return partial(setattr, self, "_reads_logs", True)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        self.rendered = None
        self._begin_table(args)
        folder = Path(args.output_dir)
        settings = records.as_json(settings_of(args, kwargs.get("model")), indent=1, default=str)
        with records.written(f"the records in {folder} could not be made ready"):
            folder.mkdir(parents=True, exist_ok=True)
            for name in (records.BOUNDS_FILE, records.COMPLETIONS_FILE):
                if state.global_step:
                    records.cut(folder / name, after=state.global_step)
                else:
                    records.move_aside(folder / name)
            if not state.global_step:
                records.move_aside(folder / records.SETTINGS_FILE)
            write_atomically(folder / records.SETTINGS_FILE, settings)

    def on_record(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        record: BoundRecord,
        completions: list[dict[str, Any]],
    ) -> None:
        """Called by the trainer on the first process, after each update and before `on_step_end`."""
        folder = Path(args.output_dir)
        records.append_line(folder / records.BOUNDS_FILE, records.as_dict(record))
        for row in completions:
            records.append_line(folder / records.COMPLETIONS_FILE, row)
        self.show(record)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        logs: dict[str, Any],
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Write a record of what one of TRL's trainers logs."""
        if not (self._reads_logs and state.is_world_process_zero):
            return
        if (record := trl_logs.record_of(args, state, logs, rescaled=rescales_gradients(optimizer))) is not None:
            self.on_record(args, state, control, record=record, completions=[])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.report_every is not None and state.global_step % self.report_every == 0 and state.is_world_process_zero:
            self.render(args)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.report is not False and state.is_world_process_zero:
            self.render(args)

    def render(self, args: TrainingArguments) -> None:
        """Write the report of what has been recorded so far. A failure is logged, as a warning only once."""
        folder = Path(args.output_dir)
        if not (folder / records.BOUNDS_FILE).exists():
            return
        requested = self.report is True or self.report_every is not None
        try:
            self.rendered = render_report(folder)
        except MissingPackageError as error:
            self._log(f"No report was rendered. {error}", warn=requested)
        except Exception as error:  # no error in the report may end the training
            self._log(
                f"The report could not be rendered ({type(error).__name__}: {error}). The records are complete; once the cause "
                f"is fixed, run: trustkl report {folder}"
            )

    def _log(self, message: str, warn: bool = True) -> None:
        log = logger.warning if warn and not self._warned else logger.info
        self._warned = self._warned or warn
        log(visible(message))

    def _begin_table(self, args: TrainingArguments) -> None:
        free = bool(args.disable_tqdm) and sys.stdout.isatty()
        self._shown = free if self.table is None else self.table
        if self._shown:
            self._print = printer(progress_bar=not args.disable_tqdm)
            self._print(HEADER, "bold")

    def show(self, record: BoundRecord) -> None:
        """Print the record's line."""
        if self._shown:
            self._print(line(record), None if record.refused is None else "yellow")


def is_report(callback: Any) -> bool:
    """Whether it is an instance or a subclass of BoundReportCallback; transformers accepts both."""
    return isinstance(callback, BoundReportCallback) or (
        isinstance(callback, type) and issubclass(callback, BoundReportCallback)
    )


def report_of(callbacks: Sequence[Any]) -> BoundReportCallback | None:
    """The BoundReportCallback among the callbacks, or None."""
    return next((each for each in callbacks if isinstance(each, BoundReportCallback)), None)


def with_report(callbacks: Sequence[Any] | None) -> list[Any]:
    """The callbacks, with a BoundReportCallback in front if there is none. ConfigError for two, which would write every
    record twice."""
    given = list(callbacks or [])
    count = sum(map(is_report, given))
    if count > 1:
        raise ConfigError(f"`callbacks` got {count} BoundReportCallbacks; it may have at most one. Remove the others.")
    return given if count else [BoundReportCallback(), *given]
