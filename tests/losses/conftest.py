"""Makes broadcasting of [B] with [B, K] an error in tests of losses."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def no_rank_promotion():
  with jax.numpy_rank_promotion("raise"):
    yield
