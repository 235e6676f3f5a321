"""Watches a process of a run from a process of its own.

A process that is killed, frozen or aborted by JAX cannot say so. So each
process of a run starts `python watcher.py`. The watchers meet at the
coordinator's address before JAX uses it: that of process 0 is the hub, and the
others connect to it. They end their processes when one is lost, with a message
that names it. Pipes and connections carry JSON, an object a line.

This module imports the standard library only, so that it starts fast. It is
longer than 400 lines, since a process that runs one file needs no other.
"""

from collections.abc import Sequence
import contextlib
import json
from multiprocessing.connection import wait
import os
import pathlib
import signal
import socket
import sys
import time
from typing import Any, NamedTuple

_BEAT_S = 1.0
_RETRY_S = 0.3
_REPORT_S = 20.0  # between two lines that say for what the start waits
_MERCY_S = 5.0  # that a process has to end by itself
_LEAVE_S = 2.0  # for the last messages to arrive


class Settings(NamedTuple):
  """Settings of a watcher, given as its argument.

  Attributes:
    pid: id of the watched process, which started the watcher.
    index: its index.
    count: number of processes of the run.
    address: HOST:PORT of the hub.
    start_timeout_s: most seconds to wait for the other processes.
    peer_timeout_s: seconds of silence after which a process is lost.
  """

  pid: int
  index: int
  count: int
  address: str
  start_timeout_s: float
  peer_timeout_s: float


class Loss(NamedTuple):
  """End of a process before its run was done.

  Attributes:
    index: index of the process.
    how: verb phrase, for the message.
    is_error: whether it raised an error; otherwise it was killed or frozen.
  """

  index: int
  how: str
  is_error: bool = False


class Channel:
  """JSON lines over a pair of file descriptors.

  Attributes:
    heard: when something was last received, by `time.monotonic`.
  """

  def __init__(self, reader: int, writer: int):
    self._reader, self._writer, self._rest = reader, writer, b""
    self.heard = time.monotonic()

  def fileno(self) -> int:
    return self._reader

  def close(self) -> None:
    os.close(self._reader)

  def close_writer(self) -> None:
    """Ends what is sent on a connection; what was sent still arrives."""
    with contextlib.suppress(OSError):
      connection = socket.socket(fileno=os.dup(self._writer))
      connection.shutdown(socket.SHUT_WR)
      connection.close()

  def send(self, **message: Any) -> None:
    """Sends its arguments as one JSON object; an ended pipe is ignored."""
    with contextlib.suppress(OSError):
      os.write(self._writer, json.dumps(message).encode() + b"\n")

  def receive(self) -> list[dict[str, Any]]:
    """Receives the objects that have arrived.

    Raises:
      EOFError: the other side has ended, or is not a watcher.
    """
    try:
      data = os.read(self._reader, 1 << 16)
      *lines, self._rest = (self._rest + data).split(b"\n")
      messages = [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
      raise EOFError from error
    if not data:
      raise EOFError
    self.heard = time.monotonic()
    return messages


class Watcher:
  """Watcher of one process: joins the others, and watches until the end."""

  def __init__(self, settings: Settings, process: Channel):
    """Opens nothing yet.

    Args:
      settings: see `Settings`.
      process: channel to the watched process, the parent of this one.
    """
    self._settings, self._process = settings, process
    self._pid = settings.pid
    self._is_hub = settings.index == 0
    self._peers: dict[int, Channel] = {}  # of the hub all, of others the hub
    self._names = {settings.index: socket.gethostname()}
    self._saved: int | None = None
    self._losses: list[Loss] = []
    self._decide_at = float("inf")
    self._running_at = time.monotonic()
    self._has_failed = self._has_ended = False

  def join(self) -> None:
    """Waits until the watchers of all processes are connected.

    Raises:
      TimeoutError: names the processes that did not come.
      OSError: the coordinator's port is not free.
      EOFError: the watched process has ended.
    """
    host, _, port = self._settings.address.rpartition(":")
    waiting = _Waiting(self._settings, self._process)
    if self._is_hub:
      self._gather(int(port), waiting)
    else:
      self._connect((host.strip("[]"), int(port)), waiting)
    names = [self._names[i] for i in range(self._settings.count)]
    self._process.send(hosts=names)

  def _gather(self, port: int, waiting: "_Waiting") -> None:
    """Accepts all other watchers on `port`, and then leaves it to JAX."""
    is_dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if is_dual else socket.AF_INET
    strangers: list[Channel] = []
    others = set(range(1, self._settings.count))
    with socket.create_server(
      ("", port), family=family, backlog=1024, dualstack_ipv6=is_dual
    ) as listener:
      while missing := sorted(others - self._peers.keys()):
        waiting.tell(missing)
        sources = [self._process, *strangers, *self._peers.values()]
        for source in wait([listener, *sources], _BEAT_S):
          if source is listener:
            strangers.append(_channel(listener.accept()[0]))
          elif source is self._process:
            self._process.receive()
          else:
            self._welcome(source, strangers)
        self._tell_peers(missing=sorted(others - self._peers.keys()))
    names = [self._names[i] for i in range(self._settings.count)]
    self._tell_peers(hosts=names)

  def _welcome(self, source: Channel, strangers: list[Channel]) -> None:
    """Reads who a stranger is, or that a peer has ended while it waited."""
    try:
      messages = source.receive()
    except EOFError:
      source.close()
      strangers[:] = [c for c in strangers if c is not source]
      self._peers = {i: c for i, c in self._peers.items() if c is not source}
      return
    for message in messages:
      strangers.remove(source)
      self._peers[message["join"]] = source
      self._names[message["join"]] = message["host"]

  def _connect(self, address: tuple[str, int], waiting: "_Waiting") -> None:
    """Connects to the hub, and waits until it has all others."""
    host = socket.gethostname()
    missing, hub = [0], None
    while True:
      waiting.tell(missing)
      if hub is None and (hub := _dial(address)):
        hub.send(join=self._settings.index, host=host)
      for source in wait([self._process, *([hub] if hub else [])], _RETRY_S):
        try:
          messages = source.receive()
        except EOFError:
          if source is self._process:
            raise
          missing, hub = [0], None
          time.sleep(_RETRY_S)
          break
        for message in messages:
          missing = message.get("missing", missing)
          if "hosts" in message:
            self._peers, self._names = (
              {0: hub},
              dict(enumerate(message["hosts"])),
            )
            return

  def watch(self) -> None:
    """Watches until the run is done or a process is lost."""
    beaten = 0.0
    while True:
      sources = {id(c): i for i, c in self._peers.items()}
      process = [] if self._has_ended else [self._process]
      for source in wait([*process, *self._peers.values()], _BEAT_S):
        if source is self._process:
          is_over = self._hear_process()
        else:
          is_over = self._hear_peer(sources[id(source)])
        if is_over:
          return
      if time.monotonic() - beaten >= _BEAT_S:
        beaten = time.monotonic()
        self._tell_peers(saved=self._saved)
        self._look()
      if self._losses and self._is_decided():
        # The loss of one process gives errors in the others.
        loss = min(self._losses, key=lambda loss: loss.is_error)
        self._tell_peers(loss=loss, saved=self._saved)
        self._end(loss)
        return

  def _hear_process(self) -> bool:
    """Reads what the watched process says; returns whether the run is over."""
    try:
      messages = self._process.receive()
    except EOFError:
      self._has_ended = True
      self._report(
        Loss(
          self._settings.index,
          "ended without a message: killed, or out of memory",
        )
      )
      return False
    for message in messages:
      if "done" in message:
        self._tell_peers(done=True)
        return True
      if "loss" in message:
        loss = Loss(*message["loss"])
        self._has_failed = True
        self._report(loss)
      if "saved" in message:
        self._saved = message["saved"]
    return False

  def _hear_peer(self, index: int) -> bool:
    """Reads what another watcher says; returns whether the run is over."""
    try:
      messages = self._peers[index].receive()
    except EOFError:
      del self._peers[index]
      self._conclude(Loss(index, "ended, and its watcher with it"))
      return False
    for message in messages:
      if "done" in message:
        self._tell_peers(done=True)
        return True
      if not self._is_hub and "saved" in message:
        self._saved = message["saved"]
      if "loss" in message:
        loss = Loss(*message["loss"])
        if not self._is_hub:
          self._end(loss)
          return True
        self._conclude(loss)
    return False

  def _look(self) -> None:
    """Reports a stopped watched process, and watchers that are silent."""
    now, timeout = time.monotonic(), self._settings.peer_timeout_s
    if self._has_ended or not _is_stopped(self._pid):
      self._running_at = now
    elif now - self._running_at > timeout:
      how = f"has been stopped for {timeout:g} s"
      self._report(Loss(self._settings.index, how))
    for index, peer in self._peers.items():
      if now - peer.heard > timeout:
        how = f"has not answered for {timeout:g} s"
        self._conclude(Loss(index, how))

  def _report(self, loss: Loss) -> None:
    """Tells the hub of a loss; on the hub itself, concludes it."""
    if self._is_hub:
      self._conclude(loss)
    else:
      self._tell_peers(loss=loss)

  def _conclude(self, loss: Loss) -> None:
    """Adds a loss, unless its process has one, to those to decide among."""
    if not self._losses:
      self._decide_at = time.monotonic() + self._settings.peer_timeout_s
    if loss.index not in {known.index for known in self._losses}:
      self._losses.append(loss)

  def _is_decided(self) -> bool:
    """Returns whether the cause is known.

    After an error, others may be about to raise it too, or to close files.
    """
    return (
      not all(loss.is_error for loss in self._losses)
      or len(self._losses) == self._settings.count
      or time.monotonic() > self._decide_at
    )

  def leave(self) -> None:
    """Closes the connections, so that the last messages arrive.

    The system resets a connection that is closed while something on it has not
    been read, and drops what is still to be sent.
    """
    peers = list(self._peers.values())
    for peer in peers:
      peer.close_writer()
    deadline = time.monotonic() + _LEAVE_S
    while peers and (left := deadline - time.monotonic()) > 0:
      for peer in wait(peers, left):
        try:
          peer.receive()
        except EOFError:
          peers.remove(peer)

  def _tell_peers(self, **message: Any) -> None:
    for peer in self._peers.values():
      peer.send(**message)

  def _end(self, loss: Loss) -> None:
    """Ends the watched process, and then says what was lost.

    JAX may abort the process too, with many lines. The message comes last.
    """
    self._process.send(loss=loss)
    deadline = time.monotonic() + (0 if _is_stopped(self._pid) else _MERCY_S)
    while os.getppid() == self._pid and time.monotonic() < deadline:
      time.sleep(0.02)
    if os.getppid() == self._pid:
      os.kill(self._pid, signal.SIGKILL)
    if not (loss.is_error and self._has_failed):
      _say(f"error: {describe(loss, self._names, self._saved)}")


class _Waiting:
  """Tells the watched process for which processes its start waits."""

  def __init__(self, settings: Settings, process: Channel):
    self._settings, self._process = settings, process
    self._began = self._told = time.monotonic()

  def tell(self, missing: Sequence[int]) -> None:
    """Sends the watched process a line about those missing, every 20 s.

    Args:
      missing: indices of the processes that have not come.

    Raises:
      TimeoutError: the time is over.
    """
    now, timeout = time.monotonic(), self._settings.start_timeout_s
    if now - self._began > timeout:
      raise TimeoutError(
        f"{name_missing(missing, self._settings)} did not come within"
        f" {timeout:g} s. Start all processes, or raise"
        " --config.hosts.start_timeout_s"
      )
    if now - self._told >= _REPORT_S:
      self._told = now
      self._process.send(
        waiting=f"waiting for {name_missing(missing, self._settings)},"
        f" {now - self._began:.0f} s of {timeout:g} s"
      )


def name_missing(missing: Sequence[int], settings: Settings) -> str:
  """Names processes that have not come: "host 1, host 2 (of 4)"."""
  listed = ", ".join(f"host {index}" for index in missing[:8])
  more = f" and {len(missing) - 8} others" if len(missing) > 8 else ""
  at = f" at {settings.address}" if 0 in missing else ""
  return f"{listed}{more}{at} (of {settings.count})"


def describe(loss: Loss, names: dict[int, str], saved: int | None) -> str:
  """Returns the message about a loss.

  Args:
    loss: the loss.
    names: host names by index.
    saved: step of the last checkpoint; 0: there is none; None: not known.
  """
  name = f"host {loss.index} ({names[loss.index]})"
  last = f"step {saved}" if saved else "none"
  known = "" if saved is None else f": the last checkpoint is {last}"
  advice = "See its log. Then start again" if loss.is_error else "Start again"
  return f"{name} {loss.how}. {advice}{known}"


def _channel(connection: socket.socket) -> Channel:
  descriptor = connection.detach()
  return Channel(descriptor, descriptor)


def _dial(address: tuple[str, int]) -> Channel | None:
  try:
    connection = socket.create_connection(address, timeout=2 * _BEAT_S)
  except OSError:
    return None
  # A port without a listener may connect to itself.
  if connection.getsockname() == connection.getpeername():
    connection.close()
    return None
  connection.settimeout(None)
  return _channel(connection)


def _is_stopped(pid: int) -> bool:
  """Returns whether SIGSTOP stopped a process; False where /proc is missing."""
  try:
    stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
  except OSError:
    return False
  return stat.rpartition(")")[2].split()[0] == "T"


def _say(text: str) -> None:
  """Writes a line, below the progress bar that a terminal may show."""
  start = "\n" if sys.stderr.isatty() else ""
  print(f"{start}{text}", file=sys.stderr, flush=True)


def main() -> None:
  # What ends the process ends its watcher, which must outlive it.
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
  process = Channel(sys.stdin.fileno(), sys.stdout.fileno())
  watcher = Watcher(Settings(*json.loads(sys.argv[1])), process)
  try:
    watcher.join()
  except EOFError:
    return
  except OSError as error:
    process.send(error=str(error))
    return
  watcher.watch()
  watcher.leave()


if __name__ == "__main__":
  main()
