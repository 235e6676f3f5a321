"""Names of TPU slices, ours and Cloud's."""

import importlib.metadata

import pytest

from dpo_jax.planning import topology
from dpo_jax.planning.topology import parse_topology


@pytest.mark.parametrize(
  ("name", "jax_name", "num_chips"),
  [
    ("v5e-64", "v5e:8x8", 64),
    ("v5litepod-256", "v5e:16x16", 256),
    ("v5e-1", "v5e:1x1", 1),
    ("v6e-8", "v6e:2x4", 8),
    ("v5p-128", "v5p:4x4x4", 64),
    ("v5p-8", "v5p:2x2x1", 4),
    ("v4-16", "v4:2x2x2", 8),
    ("tpu7x-128", "tpu7x:4x4x4", 64),
    ("v5p:2x2x8", "v5p:2x2x8", 32),
    ("v5e:4x4", "v5e:4x4", 16),
    ("2xv5e-64", "v5e:8x8", 128),
    ("4xv5p-128", "v5p:4x4x4", 256),
    ("h200-8", "h200:8", 8),
    ("a100-1", "a100:1", 1),
  ],
)
def test_names_count_what_cloud_counts(name, jax_name, num_chips):
  parsed = parse_topology(name)
  assert (parsed.jax_name, parsed.num_chips) == (jax_name, num_chips)
  assert parse_topology(parsed.name).num_chips == num_chips


@pytest.mark.parametrize(
  "name",
  [
    "v5e-63",
    "v3-8",
    "v5e",
    "v5e:4x4x4",
    "h100-3",
    "2xh100-8",
    "b300-8",
    "",
    "v5p:4x4",
  ],
)
def test_an_unknown_name_lists_those_that_are_known(name):
  with pytest.raises(ValueError, match="is unknown") as error:
    parse_topology(name)
  for known in (
    "v5p-128 (4x4x4)",
    "v6e-256 (16x16)",
    "tpu7x-8 (2x2x1)",
    "h100-8",
  ):
    assert known in str(error.value)


def test_every_known_slice_has_the_chips_that_its_name_says():
  for kind, shapes in topology._SHAPES.items():
    for shape in shapes:
      parsed = parse_topology(f"{kind}:{shape}")
      count = int(parsed.name.rpartition("-")[2])
      assert count == parsed.num_chips * parsed.chip.cores_in_name


def test_another_libtpu_than_jax_pins_is_refused(monkeypatch):
  version = importlib.metadata.version

  def other(name):
    return "0.0.52" if name == "libtpu" else version(name)

  monkeypatch.setattr(importlib.metadata, "version", other)
  with pytest.raises(RuntimeError, match=r"libtpu is 0\.0\.52, and jax"):
    topology.check_libtpu()


def test_a_missing_libtpu_is_said_to_be_missing(monkeypatch):
  version = importlib.metadata.version

  def absent(name):
    if name == "libtpu":
      raise importlib.metadata.PackageNotFoundError
    return version(name)

  monkeypatch.setattr(importlib.metadata, "version", absent)
  with pytest.raises(RuntimeError, match="libtpu is not installed"):
    topology.check_libtpu()
