"""Chips by JAX's names of devices."""

import pytest

from dpo_jax.system.chips import CHIPS, find_chip


@pytest.mark.parametrize(
  ("device_kind", "name"),
  [
    ("TPU v4", "v4"),
    ("TPU v5 lite", "v5e"),
    ("TPU v5", "v5p"),
    ("TPU v6 lite", "v6e"),
    ("TPU7x", "tpu7x"),
    ("NVIDIA A100-SXM4-80GB", "a100"),
    ("NVIDIA H100 80GB HBM3", "h100"),
    ("NVIDIA H200", "h200"),
    ("NVIDIA B200", "b200"),
  ],
)
def test_a_device_is_found_by_its_kind(device_kind, name):
  assert find_chip(device_kind) is CHIPS[name]


@pytest.mark.parametrize(
  "device_kind", ["cpu", "NVIDIA A100-SXM4-40GB", "NVIDIA GeForce RTX 4090"]
)
def test_an_unknown_device_is_not_taken_for_another(device_kind):
  assert find_chip(device_kind) is None
