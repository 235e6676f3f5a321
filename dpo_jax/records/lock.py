"""One run, one workdir: the lock that a run holds on all its hosts.

Process 0 holds it as WORKDIR/lock.json, and counts up `beat` three times in
`timeout_s`. Another process may take it over from a process that is gone. On
the same machine that is seen at once; elsewhere the beat must stand still for
`timeout_s`, so clocks of two machines are never compared.

The lock with id X is taken over by creating lock.X.json, which only one process
can. The last file of such a chain holds the lock. A process writes its own
file only: one that was frozen and wakes up cannot undo what happened meanwhile.
"""

from collections.abc import Sequence
import dataclasses
import datetime
import hashlib
import json
import logging
import math
import os
import pathlib
import socket
import threading
import time
import uuid

from etils import epath
import jax

from dpo_jax.parallel import hosts
from dpo_jax.records.workdir import Workdir
from dpo_jax.system import files

_LOG = logging.getLogger(__name__)
_TRIES = 100  # of processes that take a lock at the same time


class WorkdirInUse(ValueError):
  """Another process trains the run of this workdir."""


class LockLost(RuntimeError):
  """Another process took over the lock of this run."""


@dataclasses.dataclass(frozen=True)
class Holder:
  """A process that holds the lock; its defaults are those of a damaged file.

  Attributes:
    id: drawn at random.
    host: name of its machine, for people.
    machine: boot of the machine, and its namespace of pids.
    pid: id of the process.
    process_start: clock ticks from the boot to the start of the process.
    since: UTC, for people.
    timeout_s: seconds without a beat after which it counts as gone.
    beat: number of beats.
  """

  id: str
  host: str = ""
  machine: str = ""
  pid: int = 0
  process_start: str = ""
  since: str = ""
  timeout_s: float = 0.0
  beat: int = 0

  @classmethod
  def this_process(cls, timeout_s: float) -> "Holder":
    now = datetime.datetime.now(datetime.UTC)
    return cls(
      id=uuid.uuid4().hex,
      host=socket.gethostname(),
      machine=_machine(),
      pid=os.getpid(),
      process_start=_process_start(os.getpid()),
      since=now.isoformat(sep=" ", timespec="seconds"),
      timeout_s=float(timeout_s),
    )

  @classmethod
  def parse(cls, name: str, content: bytes) -> "Holder":
    """Reads a lock file; the id of a damaged one is a digest.

    Args:
      name: name of the file. Two damaged files may have the same content.
      content: bytes of it.
    """
    try:
      found = cls(**json.loads(content))
      types = {field.name: field.type for field in dataclasses.fields(cls)}
      if all(isinstance(getattr(found, k), t) for k, t in types.items()):
        uuid.UUID(found.id)
        if math.isfinite(found.timeout_s):
          return found
    except (ValueError, TypeError, RecursionError):
      pass
    digest = hashlib.sha256(f"{name}\n".encode() + content)
    return cls(id=digest.hexdigest()[:32])

  @property
  def content(self) -> bytes:
    return (json.dumps(dataclasses.asdict(self), indent=2) + "\n").encode()

  def __str__(self) -> str:
    if not self.host:
      return "an unknown process (its lock file is damaged)"
    return f"process {self.pid} on {self.host}, since {self.since}"

  def is_here(self) -> bool:
    """Returns whether its pid is of this machine, boot and pid namespace."""
    return bool(self.machine) and self.machine == _machine()

  def is_gone(self) -> bool:
    """Returns whether it is a process of this machine that has ended."""
    return self.is_here() and _process_start(self.pid) != self.process_start


def _machine() -> str:
  try:
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"
  except OSError:  # not Linux: no process is known to have ended
    return ""


def _process_start(pid: int) -> str:
  """Returns field 22 of /proc/PID/stat, or "" if the process has ended."""
  try:
    stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
  except OSError:
    return ""
  # Field 2, the name in parentheses, may hold spaces.
  fields = stat.rpartition(")")[2].split()
  return "" if fields[0] in "XZ" else fields[19]


class RunLock:
  """The lock of a workdir, held while the context is open.

  All processes of a run open and check it; process 0 holds it.

  Attributes:
    lost: error, once process 0 has noticed that it lost the lock.
  """

  def __init__(self, workdir: Workdir, *, timeout_s: float):
    """Takes nothing yet.

    Args:
      workdir: run directory; made when the lock is taken.
      timeout_s: seconds without a beat after which others may take over.
    """
    self.lost: LockLost | None = None
    self._workdir = workdir
    self._path = workdir.lock
    self._me = Holder.this_process(timeout_s)
    self._is_closing = threading.Event()
    self._thread = threading.Thread(target=self._keep_beating, daemon=True)

  def __enter__(self) -> "RunLock":
    """Takes the lock.

    Raises:
      WorkdirInUse: another process holds it.
      OtherHostError: the same, on the hosts that do not hold the lock.
    """
    hosts.together(self._acquire)
    return self

  def check(self) -> None:
    """Checks, on all hosts, that the run still holds its lock.

    Raises:
      LockLost: another process took it over; this one was frozen.
      OtherHostError: the same, on the hosts that do not hold the lock.
    """
    hosts.together(self._check)

  def __exit__(self, *error: object) -> None:
    if jax.process_index():
      return
    self._is_closing.set()
    self._thread.join()
    chain = self._chain()
    if self._is_mine(chain):
      for path, _ in chain:
        path.unlink(missing_ok=True)

  def _chain(self) -> list[tuple[epath.Path, Holder]]:
    """Reads the lock files; the last one holds the lock.

    Raises:
      WorkdirInUse: a file names one before it, as a copy of it does.
    """
    chain: list[tuple[epath.Path, Holder]] = []
    path = self._workdir.lock
    while (content := files.read_if_there(path)) is not None:
      if path in (known for known, _ in chain):
        raise self._unreadable()
      chain.append((path, Holder.parse(path.name, content)))
      path = self._path_after(chain[-1][1])
    return chain

  def _path_after(self, holder: Holder) -> epath.Path:
    return self._workdir.lock.with_name(f"lock.{holder.id}.json")

  def _is_mine(self, chain: Sequence[tuple[epath.Path, Holder]]) -> bool:
    return bool(chain) and chain[-1][1].id == self._me.id

  def _acquire(self) -> None:
    if jax.process_index():
      return
    self._workdir.path.mkdir(parents=True, exist_ok=True)
    for _ in range(_TRIES):
      if self._try():
        self._thread.start()
        return
      time.sleep(0.01)  # the files changed meanwhile: look again
    raise self._unreadable()

  def _try(self) -> bool:
    """Returns whether the lock was taken; raises WorkdirInUse."""
    before = self._chain()
    self._path = self._workdir.lock
    if before:
      old_path, old = before[-1]
      silence = self._wait_for_end(old)
      self._path = self._path_after(old)
    is_created = files.create(self._path, self._me.content)
    if not self._is_mine(self._chain()):
      if is_created:  # after a lock that was no longer the last
        self._path.unlink(missing_ok=True)
      return False
    if before:
      _LOG.warning(
        "%s was held by %s, %s: taken over", self._workdir, old, silence
      )
      if old.is_gone():  # it will not write any more, so its file is replaced
        self._path = self._path.replace(old_path)
    return True

  def _wait_for_end(self, holder: Holder) -> str:
    """Returns why a holder counts as gone; raises WorkdirInUse if it lives."""
    if holder.is_gone():
      return "which has ended"
    if holder.is_here():
      raise self._in_use(holder)
    timeout_s = max(self._me.timeout_s, holder.timeout_s)
    _LOG.info(
      "%s is held by %s: waiting %g s for a sign of life",
      self._workdir,
      holder,
      timeout_s,
    )
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
      time.sleep(self._me.timeout_s / 30)
      chain = self._chain()
      if not chain:
        return "which has released it"
      if chain[-1][1] != holder:
        raise self._in_use(chain[-1][1])
    return f"which gave no sign of life for {timeout_s:g} s"

  def _in_use(self, holder: Holder) -> WorkdirInUse:
    return WorkdirInUse(
      f"{self._workdir} is being trained by {holder}: two processes would spoil"
      " the run. Stop that one first, or choose another workdir; if this"
      f" folder is a copy, delete its {self._workdir.lock.name}"
    )

  def _unreadable(self) -> WorkdirInUse:
    return WorkdirInUse(
      f"the lock files of {self._workdir} do not tell which process trains it:"
      " if none does, delete its lock.json and lock.*.json"
    )

  def _check(self) -> None:
    if jax.process_index():
      return
    chain = self._chain()
    if self._is_mine(chain):
      return
    state = f"held by {chain[-1][1]}" if chain else "gone"
    self.lost = LockLost(
      f"the lock {self._workdir.lock} is {state}: it was taken over while this"
      f" process gave no sign of life for {self._me.timeout_s:g} s, or it was"
      " deleted. This process saves nothing more"
    )
    raise self.lost

  def _keep_beating(self) -> None:
    while not self._is_closing.wait(self._me.timeout_s / 3):
      try:
        self._check()
        self._me = dataclasses.replace(self._me, beat=self._me.beat + 1)
        files.write_atomically(self._path, self._me.content)
      except LockLost as error:
        _LOG.error("%s", error)
        return
      except Exception as error:  # storage that fails now may answer next time
        _LOG.warning("%s was not renewed: %s", self._path, error)
