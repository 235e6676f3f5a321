"""Eight simulated devices, and real data where a machine has them."""

import os

# XLA waits for all simulated devices in a rendezvous, and with fewer threads
# than devices it waits for ever: NPROC sizes its pool. Both must be set before
# jax is imported.
os.environ["NPROC"] = "16"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import pathlib

import jax
from jax.experimental.compilation_cache import compilation_cache
import pytest

_ROOT = pathlib.Path(__file__).parents[1]


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
def golden() -> pathlib.Path:
  """A folder of golden figures, or a skip."""
  path = pathlib.Path(
    os.environ.get("DPO_JAX_GOLDEN", _ROOT.parent / "shared" / "golden")
  )
  if not path.is_dir():
    pytest.skip("no golden figures: point DPO_JAX_GOLDEN at a folder of them")
  return path


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
  """Token stores of a test go to its own folder."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def fast_compilation(tmp_path_factory):
  """Compiles the same program once, for modules of many runs.

  Yields:
    Environment variables with which a child process does the same.
  """
  settings = {
    "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
  }
  before = {name: jax.config.values[name] for name in settings}
  for name, value in settings.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
  yield {name.upper(): str(value) for name, value in settings.items()}
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
