"""A trace of a few steps, for xprof and TensorBoard's profile tab."""

from collections.abc import Iterator
import contextlib
import logging
import tempfile
from typing import Any

from etils import epath
import jax

from dpo_jax.config import parse_steps
from dpo_jax.records.workdir import Workdir

_LOG = logging.getLogger(__name__)


class ProfileWindow:
  """Traces the steps of a window into WORKDIR/profile."""

  def __init__(self, steps: str, workdir: Workdir):
    self._steps = parse_steps(steps)
    self._folder = workdir.profile
    # The profiler writes to local disks only; a bucket gets a copy.
    self._is_remote = "://" in str(workdir)
    self._local = ""

  @contextlib.contextmanager
  def step(self, step: int) -> Iterator[None]:
    """Wraps a step; starts the trace at the first of the window."""
    if step not in self._steps:
      yield
      return
    if not self._local:
      self._local = str(self._folder)
      if self._is_remote:
        self._local = tempfile.mkdtemp(prefix="profile")
      jax.profiler.start_trace(self._local)
    with jax.profiler.StepTraceAnnotation("train", step_num=step):
      yield

  def after(self, step: int, metrics: Any) -> None:
    """Ends the trace once the window's last step has run on the device."""
    if self._local and step == self._steps[-1]:
      jax.block_until_ready(metrics)
      self.close()

  def close(self) -> None:
    """Writes the trace, complete or not."""
    if not self._local:
      return
    jax.profiler.stop_trace()
    if self._is_remote:
      self._copy()
    _LOG.info("profile: %s", self._folder)
    self._local, self._steps = "", range(0)

  def _copy(self) -> None:
    source = epath.Path(self._local)
    for path in source.glob("plugins/profile/*/*"):
      target = self._folder / path.relative_to(source)
      target.parent.mkdir(parents=True, exist_ok=True)
      target.write_bytes(path.read_bytes())
