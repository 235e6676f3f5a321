"""Several hosts: joined, and held to the same config and data.

On a TPU pod `joined` needs no flags; elsewhere three flags identify the
processes. A difference between hosts is named before anything is compiled.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import glob
import importlib.util
import json
import math
import os
from typing import Any, TypeVar

import jax
from jax.experimental import multihost_utils
import numpy as np

from dpo_jax.config import VALUES
from dpo_jax.parallel import watcher
from dpo_jax.parallel.peers import OtherHostError, Peers
from dpo_jax.system import compat

T = TypeVar("T")


class HostsDifferError(ValueError):
  """One host has another config or other data than the rest."""


def is_tpu_pod() -> bool:
  """Returns whether this machine may be one host of a TPU slice of several.

  True too on a Cloud TPU VM by itself, where the environment names no hosts.
  Reads the environment and the devices only. JAX itself asks Google's metadata
  server, which would hang on other machines.
  """
  if os.environ.get("JAX_PLATFORMS", "tpu").split(",")[0] not in ("", "tpu"):
    return False
  hosts = os.environ.get("TPU_WORKER_HOSTNAMES")
  if os.environ.get("MEGASCALE_COORDINATOR_ADDRESS"):
    return True
  if hosts is not None:
    return "," in hosts
  # A Cloud TPU VM sets neither of them; its chips are these.
  has_chips = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
  return bool(has_chips) and importlib.util.find_spec("libtpu") is not None


@contextlib.contextmanager
def joined(
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  start_timeout_s: float,
  peer_timeout_s: float,
) -> Iterator[None]:
  """Joins the processes of a run.

  Without the first three it does nothing on a machine by itself, or where
  `jax.distributed` is initialized already. Within the context this process ends
  if another is lost: see `peers`.

  Args:
    coordinator_address: HOST:PORT of process 0; None on a TPU pod.
    num_processes: number of processes.
    process_id: index of this process, from 0.
    start_timeout_s: most seconds to wait for the other processes.
    peer_timeout_s: seconds of silence after which another process is lost.

  Raises:
    ValueError: some of the three are given, or out of range.
    OtherHostError: names the processes that did not come.
  """
  given = (coordinator_address, num_processes, process_id)
  if all(x is None for x in given):
    if not is_tpu_pod() or jax.distributed.is_initialized():
      yield
      return
    given = compat.find_processes(start_timeout_s)
  address, count, index = given
  _check_flags(address, count, index)
  settings = watcher.Settings(
    os.getpid(), index, count, address, start_timeout_s, peer_timeout_s
  )
  for name in ("start_timeout_s", "peer_timeout_s"):
    VALUES[f"hosts.{name}"].check(f"hosts.{name}", getattr(settings, name))
  with Peers(settings) if count > 1 else contextlib.nullcontext():
    jax.distributed.initialize(
      address,
      count,
      index,
      initialization_timeout=math.ceil(start_timeout_s),
      # For a process whose watcher is lost too.
      heartbeat_timeout_seconds=math.ceil(2 * peer_timeout_s),
    )
    yield


def _check_flags(
  address: str | None, count: int | None, index: int | None
) -> None:
  if address is None or count is None or index is None:
    raise ValueError(
      "--coordinator_address, --num_processes and --process_id belong"
      f" together, and they are {address!r}, {count!r} and {index!r}: give all"
      " three, or none on a TPU pod"
    )
  if not 0 <= index < count:
    raise ValueError(
      f"--process_id={index} must be at least 0 and below"
      f" --num_processes={count}"
    )


def gather_texts(text: str) -> list[str]:
  """Gathers a text from every process, in their order; all must call it."""
  if jax.process_count() == 1:
    return [text]
  raw = np.frombuffer(text.encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.array([len(raw)], np.int32))
  padded = np.zeros(max(int(sizes.max()), 1), np.uint8)
  padded[: len(raw)] = raw
  rows = np.asarray(multihost_utils.process_allgather(padded))
  return [
    row[: int(size)].tobytes().decode()
    for row, size in zip(rows, sizes.reshape(-1), strict=True)
  ]


def check_same(values: Mapping[str, Any], what: str) -> None:
  """Raises HostsDifferError, on every host, unless all have the same values.

  Args:
    values: values by name, which `json` can write.
    what: name of what they describe, for the message.
  """
  mine = json.dumps(dict(values), sort_keys=True, default=str)
  rows = [json.loads(text) for text in gather_texts(mine)]
  differences = [
    f"  {name}: {rows[0].get(name)!r} on host 0, {row.get(name)!r} on host {i}"
    for i, row in enumerate(rows)
    for name in sorted(rows[0].keys() | row.keys())
    if row.get(name) != rows[0].get(name)
  ]
  if differences:
    raise HostsDifferError(
      f"the hosts do not have the same {what}:\n"
      + "\n".join(differences)
      + "\nStart all of them with the same command, on the same files"
    )


def together(function: Callable[[], T]) -> T:
  """Runs a function that may fail on one host, and fails on all if it does.

  Otherwise the other hosts would wait for the one that failed.

  Args:
    function: takes no argument; must not wait for other hosts itself.

  Returns:
    The function's result.

  Raises:
    OtherHostError: the function failed on another host; gives its message. A
      host where it fails raises the error itself.
  """
  if jax.process_count() == 1:
    return function()
  result, error = None, None
  try:
    result = function()
  except Exception as raised:  # every host must reach the gathering below
    error = raised
  errors = gather_texts("" if error is None else f"{error}")
  if error is not None:
    raise error
  for host, text in enumerate(errors):
    if text:
      raise OtherHostError(f"host {host}: {text}")
  return result


def to_host(x: jax.Array) -> np.ndarray:
  """Returns a global array as numpy, whole on every host.

  All processes must make this call: parts on other hosts are gathered.
  """
  if x.is_fully_addressable:
    return np.asarray(x)
  return np.asarray(multihost_utils.process_allgather(x, tiled=True))
