"""Eight simulated devices, and real data where a machine has them."""

import atexit
import collections
import importlib.util
import os
import shutil
import signal
import tempfile

from tests import xla_flags

# XLA waits for all simulated devices in a rendezvous, and with fewer threads
# than devices it waits for ever: NPROC sizes its pool. Both must be set before
# jax is imported.
os.environ["NPROC"] = "16"
os.environ["JAX_PLATFORMS"] = "cpu"
# Workers inherit what the process that started them has tried.
if "PYTEST_XDIST_WORKER" not in os.environ:
  # Most programs of a test run once, and take longer to compile than to run: a
  # third as long without the fusion emitters of jax 0.10; jax 0.12 has no such
  # option, and ignores it. Children do the same.
  faster = xla_flags.known(
    "--xla_backend_optimization_level=1"
    " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    " --xla_cpu_parallel_codegen_split_count=1"
  )
  os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {faster}"

# What one test compiles, others, their children and the other workers, which
# inherit these, need not.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  _compiled = tempfile.mkdtemp(prefix="dpo_jax_compiled_")
  atexit.register(shutil.rmtree, _compiled, ignore_errors=True)
  os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import logging
import pathlib

from absl import logging as absl_logging
import jax
import pytest

from dpo_jax.parallel import mesh as mesh_lib
from dpo_jax.planning import topology
from tests import tiny

# Under nohup, or in the background of a script, these are ignored, and every
# child would ignore them too.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

_make_mesh = mesh_lib.make_mesh
_ROOT = pathlib.Path(__file__).parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Files with slow tests first, lest a worker be left alone with one."""
  slow = collections.Counter(
    item.path for item in items if item.get_closest_marker("slow")
  )
  items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session")
def real_data() -> pathlib.Path:
  """A folder of real data sets and checkpoints, or a skip."""
  path = pathlib.Path(
    os.environ.get("DPO_JAX_DATA", _ROOT.parent / "shared" / "data")
  )
  if not path.is_dir():
    pytest.skip("no real data: point DPO_JAX_DATA at a folder of them")
  return path


@pytest.fixture(scope="session")
def libtpu() -> None:
  """A libtpu of the version that jax pins, or a skip."""
  try:
    topology.check_libtpu()
  except RuntimeError as error:
    pytest.skip(str(error))


@pytest.fixture
def cuda(monkeypatch) -> None:
  """JAX's CUDA plugin, which compiles without a GPU, or a skip."""
  plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
  if not any(map(importlib.util.find_spec, plugins)):
    pytest.skip("no CUDA plugin of JAX")
  monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
  """Token stores of a test go to its own folder."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def logs():
  """Undoes `show_logs` after the test."""
  names = ("dpo_jax", "experiments", "__main__")
  root = logging.getLogger()
  handlers, level = list(root.handlers), root.level
  levels = {name: logging.getLogger(name).level for name in names}
  verbosity = absl_logging.get_verbosity()
  yield
  root.handlers[:] = handlers
  root.setLevel(level)
  for name in names:
    logging.getLogger(name).setLevel(levels[name])
  absl_logging.set_verbosity(verbosity)


@pytest.fixture(scope="module")
def unoptimized():
  """Programs that run a few steps take longer to optimize than to run."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def traced_once():
  """Shares what the runs of one file compile."""
  with tiny.shared_programs():
    yield


@pytest.fixture(scope="module")
def on_one_device():
  """A mesh of one device, for which there is less to compile and to wait."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      mesh_lib, "make_mesh", lambda sizes: _make_mesh(sizes, jax.devices()[:1])
    )
    yield


@pytest.fixture
def on_all_devices(on_one_device, monkeypatch):
  """Gives a test all devices, in a module whose tests run on one."""
  monkeypatch.setattr(mesh_lib, "make_mesh", _make_mesh)


@pytest.fixture(scope="module")
def in_haste(unoptimized, traced_once, on_one_device):
  """For tests of what a run does, not of how it is laid out."""
