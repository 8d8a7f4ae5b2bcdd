"""The model card of a run: TRL's, with a section on how far the run may have moved the model."""

from __future__ import annotations

import os
from pathlib import Path

from transformers.utils import logging

from ..callbacks.bound_report import is_report
from ..errors import DataError
from ..report import model_card as card
from ..report import read_run
from ..types import BoundRecord

logger = logging.get_logger(__name__)


class Cards:
    """A mixin of the trainer."""

    @property
    def _model_name(self) -> str:
        return (self.args.hub_model_id or Path(self.args.output_dir).resolve().name).split("/")[-1]

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """TRL's card in output_dir, with a section on how far the run may have moved the model."""
        try:
            super().create_model_card(model_name, dataset_name, tags)
        except ModuleNotFoundError as error:  # TRL's template needs a package that it does not always ask for
            logger.warning_once(f"No model card was written: the package {error.name} is not installed.")
            return
        self._describe(Path(self.args.output_dir))

    def _create_final_card(self) -> None:
        """The card at the end of a run that saved none; a README that is no card of a run of ours stays as it is."""
        readme = Path(self.args.output_dir) / card.README
        if not readme.exists():
            self.create_model_card(model_name=self._model_name)
        elif card.START in readme.read_text(encoding="utf-8", errors="replace"):
            self._describe(readme.parent)

    def _describe(self, folder: Path) -> None:
        """Put the section into the folder's README: PEFT's, TRL's, or where the weights have none a copy of TRL's."""
        if not self.is_world_process_zero():
            return
        written = Path(self.args.output_dir) / card.README
        readme = folder / card.README
        source = readme if readme.exists() else written
        if source.exists():
            report = next((cb.rendered for cb in self.callback_handler.callbacks if is_report(cb)), None)
            link = None if report is None else os.path.relpath(report, folder)
            text = source.read_text(encoding="utf-8", errors="replace")
            readme.write_text(
                card.with_section(text, card.section(self._recorded(), self.args, link)), encoding="utf-8"
            )

    def _recorded(self) -> list[BoundRecord]:
        """The records of this run so far, as its folder has them; none where nothing writes them."""
        if self.state.global_step == 0 or not any(map(is_report, self.callback_handler.callbacks)):
            return []
        try:
            found = read_run(self.args.output_dir, completions=False).records
        except DataError:
            return []
        return [record for record in found if record.update <= self.state.global_step]
