"""A response's reward, in nats: the quantity that a link compares.

Every function takes `Sequences` with [B, K] fields and returns f32 [B, K].
Slots that hold no response give a finite number, which links must not read.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dpo_jax.types import Sequences


def needs(*fields: str) -> Callable[[Callable], Callable]:
  """Marks a function as reading optional fields of `Sequences`."""

  def mark(function: Callable) -> Callable:
    function.needs = fields
    return function

  return mark


@needs("ref_logps")
def log_ratio(sequences: Sequences) -> jax.Array:
  """log pi(y|x) / pi_ref(y|x), the implicit reward of DPO without its beta.

  Rafailov et al. 2023 (arXiv:2305.18290), eq. 5; the log-partition term that
  it leaves out is the same for all responses of a prompt.
  """
  return sequences.logps - sequences.ref_logps


@needs("ref_logps")
def mean_log_ratio(sequences: Sequences) -> jax.Array:
  """`log_ratio` divided by the response's number of scored tokens."""
  return log_ratio(sequences) / jnp.maximum(sequences.num_tokens, 1.0)


@needs("ref_logps")
def summed_or_mean_log_ratio(
  sequences: Sequences, *, length_normalize: bool
) -> jax.Array:
  """`log_ratio`, or `mean_log_ratio` if `length_normalize`.

  For losses whose published implementations disagree on the two: the same
  strength of regularisation is a different objective under each.
  """
  return mean_log_ratio(sequences) if length_normalize else log_ratio(sequences)


def logps(sequences: Sequences) -> jax.Array:
  """log pi(y|x): reference-free."""
  return sequences.logps
