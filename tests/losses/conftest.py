"""In a loss, [B] against [B, K] must never broadcast by accident."""

import jax
import pytest


@pytest.fixture(autouse=True)
def no_rank_promotion():
  with jax.numpy_rank_promotion("raise"):
    yield
