"""The end of a training that a kill cut off behind its last step."""

import pytorch_lightning as pl
from pytorch_lightning.loops.fit_loop import _FitLoop


class Ending(_FitLoop):
    """A fit that still ends if there is no step left to make.

    Lightning's returns at once then, so that what callbacks do when training ends (measure held
    out images, draw, save) would be missing for good from a run killed while they did it.
    """

    @property
    def skip(self) -> bool:
        """Whether there is nothing to do at all."""
        nothing = self.max_batches == 0 or self.trainer.limit_train_batches == 0
        return super().skip if nothing or self.epoch_loop.global_step == 0 else False

    def on_run_start(self) -> None:
        """Counts an epoch that the last step cut short, as Lightning does at that step."""
        if super().skip:
            self.epoch_progress.current.completed = self.epoch_progress.current.ready
        super().on_run_start()


def finishes(trainer: pl.Trainer) -> pl.Trainer:
    """The trainer, whose fit of a run that made all its steps now ends as any other."""
    assert type(trainer.fit_loop) is _FitLoop
    trainer.fit_loop.__class__ = Ending
    return trainer
