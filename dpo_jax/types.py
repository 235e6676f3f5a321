"""Batch, Sequences and TrainState, the structures that all modules share.

Shape letters, here and in every docstring:

  R  rows of a packed batch        B  groups (B = R * G after flattening)
  T  token slots of a row          K  responses of a group
  S  scored tokens of a row        V  vocabulary
  G  groups of a row               D  model width
  H  attention heads               L  layers
  N  examples of a dataset         M  tokens that a sampled response may have
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import flax.struct
import jax
import numpy as np

from dpo_jax.trees import join_trees

# Array of a batch: numpy on the host that makes it, jax on the devices.
Array = jax.Array | np.ndarray


@flax.struct.dataclass
class Batch:
  """Packed rows of preference groups.

  A row holds several groups; a group is its prompt, once, followed by its
  responses. The first axis of group arrays is the row, so sums from tokens to
  responses stay inside a row and inside a device.

  Attributes:
    tokens: i32 [R, T], 0 where padded.
    positions: i32 [R, T], position of a token in its own prompt + response;
      every response restarts at its prompt's length.
    segments: i32 [R, T], tokens attend within their segment only; 0 is
      padding. With shared prompts a segment is a group.
    branches: i32 [R, T], 0 in a prompt, k + 1 in a segment's k-th response.
    targets: i32 [R, S], ids of the scored tokens.
    predictors: i32 [R, S], index in the row of the token whose hidden state
      predicts the target. For a first response token that is the last token
      of the prompt, which is why targets are not simply shifted tokens.
    slots: i32 [R, S], g * K + k of the response the target belongs to;
      G * K marks padding.
    score: f32 [R, G, K], feedback, higher is better.
    valid: bool [R, G, K], False where a slot holds no response.
    example_ids: i32 [R, G], index of the group in its dataset, -1 if none.
    last_tokens: i32 [R, G, K], index in the row of each response's last token.
    ref_logps: f32 [R, G, K] cached log-probs under the reference, nats, or
      None.
    token_masks: name -> bool [R, S], scored tokens that a field of Sequences is
      restricted to, if the loss reads one. "head": the first n of a response, n
      the length of its group's shortest; "sampled": n of them, drawn at random.
    on_policy: fields of Sequences that on-policy batches have, f32 [R, G, K] or
      [R, G, K, M] each; {} for other data.
  """

  tokens: Array
  positions: Array
  segments: Array
  branches: Array
  targets: Array
  predictors: Array
  slots: Array
  score: Array
  valid: Array
  example_ids: Array
  last_tokens: Array
  ref_logps: Array | None = None
  token_masks: dict[str, Array] = dataclasses.field(default_factory=dict)
  on_policy: dict[str, Array] = dataclasses.field(default_factory=dict)

  @property
  def max_tokens(self) -> int:
    """M of its fields of single tokens; 0 without such a field."""
    return max(
      (x.shape[3] for x in self.on_policy.values() if x.ndim == 4), default=0
    )


@dataclasses.dataclass(frozen=True)
class Field:
  """Describes how an optional field of Sequences is computed.

  Attributes:
    source: "policy", computed in every forward pass; "reference", from a cache
      or a live reference; "live_reference", from a reference that runs in the
      step, because a cache has only summed log-probs; "mismatched", see
      `data.mismatched`; "values", from a value head; "tokens", single tokens,
      on-policy only; "on_policy", from the batch.
    sums: name of the statistic of `logps.chunked_token_figures` that it sums
      over the scored tokens of a response; "" for a field that is not such a
      sum.
    mask: name in `Batch.token_masks` of the tokens to sum; "" for all.
    is_mean: whether the sum is divided by the number of tokens.
    reads_value_head: whether the model needs a value head.
  """

  source: str
  sums: str = ""
  mask: str = ""
  is_mean: bool = False
  reads_value_head: bool = False


def _optional(source: str, **properties: Any) -> Any:
  field = Field(source, **properties)
  return dataclasses.field(default=None, metadata={"optional": field})


def _absent() -> Any:
  return dataclasses.field(default=None)


@flax.struct.dataclass
class Sequences:
  """Inputs of a loss: one value for each response of each group.

  Fields below `valid` are optional. They are computed only for losses that read
  them, as FIELDS describes, and are None otherwise. Their type is that which
  such a loss finds.

  Attributes:
    logps: f32 [B, K], log pi(y|x) summed over scored tokens, nats.
    num_tokens: f32 [B, K], scored tokens of each response, EOS included.
    score: f32 [B, K], feedback, higher is better; a pair has slot 0 chosen.
    valid: bool [B, K], False where a slot holds no response.
    ref_logps: f32 [B, K], as logps under the reference.
    head_logps: f32 [B, K], logps of the first n tokens, n the length of the
      group's shortest response.
    ref_head_logps: f32 [B, K], as head_logps under the reference.
    sampled_logps: f32 [B, K], logps of n tokens drawn at random.
    ref_sampled_logps: f32 [B, K], the same tokens under the reference.
    mismatched_logps: f32 [B], log-prob of another group's response.
    mismatched_ref_logps: f32 [B], the same under the reference.
    complement_logps: f32 [B, K], sum over tokens of log(1 - p(token)).
    alignment: f32 [B, K], mean over tokens of log p(token) - log sum_v p(v)^2.
    kl: f32 [B, K], sum over positions of KL(pi_ref || pi), exact over V.
    values: f32 [B, K], the value head at the response's last token.
    token_mask: bool [B, K, M], whether a response has that many tokens.
    token_logps: f32 [B, K, M], log-probs of single tokens.
    token_values: f32 [B, K, M], the value head where a token is predicted.
    ref_token_logps: f32 [B, K, M], as token_logps under the reference.
    old_logps: f32 [B, K], logps under the policy that sampled the responses.
    old_token_logps: f32 [B, K, M], the same of single tokens; this and the
      next three are 0 after a response's end.
    old_token_values: f32 [B, K, M], the value head then.
    advantages: f32 [B, K, M].
    returns: f32 [B, K, M], what the value head is fitted to.
    sample_weight: f32 [B, K], weight of a response in a mean over the batch's
      own samples: 0 for one of the data. Over B groups the weights sum to B.
    num_groups: f32 [], valid groups of the global batch. None means that
      these sequences are the whole batch.
    total_tokens: f32 [], scored tokens of the global batch, or None likewise.
  """

  logps: jax.Array
  num_tokens: jax.Array
  score: jax.Array
  valid: jax.Array
  ref_logps: jax.Array = _optional("reference", sums="ref_logps")
  head_logps: jax.Array = _optional("policy", sums="logps", mask="head")
  ref_head_logps: jax.Array = _optional(
    "live_reference", sums="ref_logps", mask="head"
  )
  sampled_logps: jax.Array = _optional("policy", sums="logps", mask="sampled")
  ref_sampled_logps: jax.Array = _optional(
    "live_reference", sums="ref_logps", mask="sampled"
  )
  mismatched_logps: jax.Array = _optional("mismatched")
  mismatched_ref_logps: jax.Array = _optional("mismatched")
  complement_logps: jax.Array = _optional("policy", sums="complement_logps")
  alignment: jax.Array = _optional("policy", sums="alignment", is_mean=True)
  kl: jax.Array = _optional("live_reference", sums="kl")
  values: jax.Array = _optional("values", reads_value_head=True)
  token_mask: jax.Array = _optional("tokens")
  token_logps: jax.Array = _optional("tokens")
  token_values: jax.Array = _optional("tokens", reads_value_head=True)
  ref_token_logps: jax.Array = _optional("tokens")
  old_logps: jax.Array = _optional("on_policy")
  old_token_logps: jax.Array = _optional("on_policy")
  old_token_values: jax.Array = _optional("on_policy")
  advantages: jax.Array = _optional("on_policy")
  returns: jax.Array = _optional("on_policy")
  sample_weight: jax.Array = _optional("on_policy")
  num_groups: jax.Array = _absent()
  total_tokens: jax.Array = _absent()


# The optional fields of Sequences.
FIELDS: dict[str, Field] = {
  field.name: field.metadata["optional"]
  for field in dataclasses.fields(Sequences)
  if "optional" in field.metadata
}


def fields_where(holds: Callable[[Field], Any]) -> frozenset[str]:
  """Returns the names of the optional fields for which `holds` is true."""
  return frozenset(name for name, field in FIELDS.items() if holds(field))


def fields_of(*sources: str) -> frozenset[str]:
  """Returns the names of the fields of Sequences that come from some sources.

  Args:
    *sources: values of `Field.source`, such as "policy" or "on_policy".
  """
  return fields_where(lambda field: field.source in sources)


def token_masks(fields: frozenset[str]) -> frozenset[str]:
  """Returns the names in `Batch.token_masks` that fields of Sequences need.

  Args:
    fields: names of optional fields.
  """
  masks = (FIELDS[name].mask for name in fields)
  return frozenset(mask for mask in masks if mask)


@flax.struct.dataclass
class TrainState:
  """Everything that a step changes, and the parameters that it does not.

  A checkpoint has all but `frozen_params`, which are read from their source
  again.

  Attributes:
    step: i32 [], optimizer steps taken.
    params: trained parameters, a nested dict: all of the policy, its adapters,
      or those that `policy.frozen` does not match.
    opt_state: optax state.
    loss_state: state of the objective (running means), or ().
    ref_params: parameters of a reference that runs in a step, without frozen
      ones: a copy of the trained ones (`reference.kind` "frozen" or "ema"), or
      {} ("adapter_off"). None for a reference that does not run in a step.
    frozen_params: the policy's other parameters, or None.
    spikes: `training.spikes.SpikeState`, or () where no step is skipped.
  """

  step: jax.Array
  params: Any
  opt_state: Any
  loss_state: Any = ()
  ref_params: Any = None
  frozen_params: Any = None
  spikes: Any = ()

  @property
  def policy_params(self) -> Any:
    """All parameters of the policy."""
    return join_trees(self.params, self.frozen_params)

  @property
  def reference_params(self) -> Any:
    """All parameters of the reference, or None if it does not run."""
    if self.ref_params is None:
      return None
    return join_trees(self.ref_params, self.frozen_params)
