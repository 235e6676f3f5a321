"""Flags that this jaxlib has, and those that it has not."""

import pytest

from tests import xla_flags


def test_flags_that_xla_knows_are_used():
  flags = "--xla_force_host_platform_device_count=8"
  assert xla_flags.known(flags) == flags


def test_a_flag_that_xla_does_not_know_is_dropped_and_named():
  with pytest.warns(UserWarning, match="Unknown flag.*--xla_invented=1"):
    assert xla_flags.known("--xla_invented=1") == ""
