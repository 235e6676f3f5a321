"""The three structures that everything else passes around.

Shape letters, here and in every docstring:

  R  rows of a packed batch        B  groups (B = R * G after flattening)
  T  token slots of a row          K  responses of a group
  S  scored tokens of a row        V  vocabulary
  G  groups of a row               D  model width
  H  attention heads               L  layers
  N  examples of a dataset         M  tokens that a sampled response may have
"""

from typing import Any

import flax.struct
import jax


@flax.struct.dataclass
class Batch:
  """Packed rows of preference groups.

  A row holds several groups; a group is its prompt, once, followed by its
  responses. Group arrays carry the row as their first axis, so that the sums
  from tokens to responses stay inside a row, hence inside a device.

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
    ref_logps: f32 [R, G, K] log-probs under the reference, nats, where they
      were cached; else None.
    head: bool [R, S], whether a scored token is among the first n of its
      response, n the length of its group's shortest; None if nothing asks.
    sampled: bool [R, S], n scored tokens of every response, drawn at random.
    old_logps: f32 [R, G, K], of on-policy data: log-probs under the policy
      that sampled the responses, nats; None of other data, as the next four.
    old_token_logps: f32 [R, G, K, M], the same of single tokens; this and the
      next three are 0 after a response's end.
    old_token_values: f32 [R, G, K, M], the value head then.
    advantages: f32 [R, G, K, M].
    returns: f32 [R, G, K, M], what the value head is fitted to.
  """

  tokens: jax.Array
  positions: jax.Array
  segments: jax.Array
  branches: jax.Array
  targets: jax.Array
  predictors: jax.Array
  slots: jax.Array
  score: jax.Array
  valid: jax.Array
  example_ids: jax.Array
  last_tokens: jax.Array
  ref_logps: jax.Array | None = None
  head: jax.Array | None = None
  sampled: jax.Array | None = None
  old_logps: jax.Array | None = None
  old_token_logps: jax.Array | None = None
  old_token_values: jax.Array | None = None
  advantages: jax.Array | None = None
  returns: jax.Array | None = None


@flax.struct.dataclass
class Sequences:
  """What a loss sees: one figure for each response of each group.

  Fields below `valid` are optional; a loss that reads one says so, and only
  then is it computed.

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
    old_logps: f32 [B, K], see Batch.
    old_token_logps: f32 [B, K, M], see Batch, as the next three.
    old_token_values: f32 [B, K, M].
    advantages: f32 [B, K, M].
    returns: f32 [B, K, M].
    num_groups: f32 [], valid groups of the global batch. None means that
      these sequences are the whole batch.
    total_tokens: f32 [], scored tokens of the global batch, or None likewise.
  """

  logps: jax.Array
  num_tokens: jax.Array
  score: jax.Array
  valid: jax.Array
  ref_logps: jax.Array | None = None
  head_logps: jax.Array | None = None
  ref_head_logps: jax.Array | None = None
  sampled_logps: jax.Array | None = None
  ref_sampled_logps: jax.Array | None = None
  mismatched_logps: jax.Array | None = None
  mismatched_ref_logps: jax.Array | None = None
  complement_logps: jax.Array | None = None
  alignment: jax.Array | None = None
  kl: jax.Array | None = None
  values: jax.Array | None = None
  token_mask: jax.Array | None = None
  token_logps: jax.Array | None = None
  token_values: jax.Array | None = None
  ref_token_logps: jax.Array | None = None
  old_logps: jax.Array | None = None
  old_token_logps: jax.Array | None = None
  old_token_values: jax.Array | None = None
  advantages: jax.Array | None = None
  returns: jax.Array | None = None
  num_groups: jax.Array | None = None
  total_tokens: jax.Array | None = None


@flax.struct.dataclass
class TrainState:
  """Everything that a step changes, and the parameters that it does not.

  A checkpoint holds all but `frozen_params`, which are read again from where
  they came.

  Attributes:
    step: i32 [], optimizer steps taken.
    params: the parameters that are trained, a nested dict: the policy's, or
      its adapters, or what `policy.frozen` leaves.
    opt_state: optax state.
    loss_state: state of the objective (running means), or ().
    ref_params: the reference's parameters where they live on the device, as
      far as they are not frozen ones: a copy of what is trained
      (`reference.kind` "frozen" or "ema"), nothing ("adapter_off"); None for
      a reference that does not run in a step.
    frozen_params: the policy's other parameters, or None.
  """

  step: jax.Array
  params: Any
  opt_state: Any
  loss_state: Any = ()
  ref_params: Any = None
  frozen_params: Any = None

  @property
  def policy_params(self) -> Any:
    """All parameters of the policy."""
    return join_trees(self.params, self.frozen_params)

  @property
  def reference_params(self) -> Any:
    """All parameters of the reference, or None where it does not run."""
    if self.ref_params is None:
      return None
    return join_trees(self.ref_params, self.frozen_params)


def join_trees(one: Any, other: Any) -> Any:
  """The leaves of two nested dicts that have none in common."""
  if other is None:
    return one
  joined = dict(other)
  for key, value in one.items():
    joined[key] = join_trees(value, other[key]) if key in other else value
  return joined
