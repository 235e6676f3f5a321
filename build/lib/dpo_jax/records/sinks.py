"""Sinks: receive what a run records, in addition to the files of a workdir."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from etils import epath

from dpo_jax.system import files


class Sink(Protocol):
  """Receives the metrics, samples and plots of a run."""

  def write(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
    """Receives the metrics of a step.

    Args:
      step: steps taken.
      split: "train", "eval", "eval/NAME" or "online".
      metrics: metrics by name; may be NaN or infinite.
    """

  def write_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Receives the samples of a step: rows of samples.jsonl."""

  def write_plot(self, path: epath.Path) -> None:
    """Receives a PNG file."""

  def close(self) -> None:
    """Sends what is left."""


class TensorBoard:
  """Sink that writes event files."""

  def __init__(self, folder: epath.Path):
    from tensorboardX import SummaryWriter  # slow to import

    self._events = SummaryWriter(str(folder))

  def write(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
    for name, value in metrics.items():
      self._events.add_scalar(f"{split}/{name}", value, step)
    self._events.flush()

  def write_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
    for i, row in enumerate(rows):
      text = "\n\n".join(f"**{name}** {value}" for name, value in row.items())
      self._events.add_text(f"samples/{i}", text, step)
    self._events.flush()

  def write_plot(self, path: epath.Path) -> None:
    from matplotlib import image  # slow to import

    pixels = image.imread(files.local(path))
    self._events.add_image(path.stem, pixels, dataformats="HWC")

  def close(self) -> None:
    self._events.close()
