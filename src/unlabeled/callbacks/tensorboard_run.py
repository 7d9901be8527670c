"""A run in TensorBoard."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch.utils.tensorboard import SummaryWriter

from unlabeled.shown import Files, Images, Table, montage


class TensorBoard:
    """Event files with the names of `metrics.csv`, pictures, and tables as text.

    Args:
        folder: where they lie.
    """

    def __init__(self, folder: Path) -> None:
        self.writer = SummaryWriter(str(folder))

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """The config as text."""
        text = yaml.safe_dump(dict(params), sort_keys=False, allow_unicode=True)
        self.writer.add_text("config", f"```\n{text}```")

    def log_metrics(self, metrics: Mapping[str, float], step: int | None) -> None:
        """A point on each curve."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, float(value), step)
        self.writer.flush()

    def log_images(self, images: Images, step: int) -> None:
        """Pictures one below the other."""
        sheet = montage([[image] for image in images.images])
        self.writer.add_image(images.name, sheet, step, dataformats="HWC")

    def log_table(self, table: Table, step: int) -> None:
        """Its drawing, or its pictures in rows; its words as Markdown."""
        pictures = [[x for x in row if hasattr(x, "shape")] for row in table.rows]
        drawing = table.drawing
        if drawing is None and any(pictures):
            drawing = montage([row for row in pictures if row])
        if drawing is not None:
            self.writer.add_image(table.name, drawing, step, dataformats="HWC")
        if table.chart != "points":  # thousands of rows that mean nothing to read
            self.writer.add_text(table.name, _markdown(table), step)
        self.writer.flush()

    def log_files(self, files: Files) -> None:
        """Nothing: they are in the run's folder."""

    def close(self, state: str) -> None:
        """Writes what is left."""
        self.writer.close()


def _markdown(table: Table) -> str:
    shown = [i for i, x in enumerate(table.rows[0]) if not hasattr(x, "shape")]
    lines = [[table.columns[i] for i in shown], ["---"] * len(shown)]
    lines += [[_cell(row[i]) for i in shown] for row in table.rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|")
