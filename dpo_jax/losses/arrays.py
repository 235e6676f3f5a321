"""Evaluates a row of the catalogue on plain arrays, given by name.

`dpo_jax.losses.functions` calls it. A loss that depends on the other groups of
the batch, or on earlier steps, needs `build_objective`.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax.losses.catalogue import CATALOGUE, Loss
from dpo_jax.losses.groups import GROUPS
from dpo_jax.losses.knobs import KNOBS
from dpo_jax.losses.objective import Objective
from dpo_jax.types import Sequences


@dataclasses.dataclass(frozen=True)
class Argument:
  """An array that a loss reads.

  Attributes:
    field: field of Sequences that holds it.
    doc: meaning and unit.
    slot: slot of the group that it fills; None if it has all slots.
    shape: axes, "B", "B, K" or "B, K, M".
    is_bool: whether it is bool and not f32.
  """

  field: str
  doc: str
  slot: int | None = 0
  shape: str = "B"
  is_bool: bool = False


_PAIR_FIELDS = {
  "policy_{}_logps": ("logps", "log pi(y|x) of the {} response, nats"),
  "ref_{}_logps": ("ref_logps", "log pi_ref(y|x) of the {} response, nats"),
  "{}_num_tokens": (
    "num_tokens",
    "tokens of the {} response, EOS included; 0 counts as 1",
  ),
  "{}_score": ("score", "score of the {} response, higher is better"),
  "policy_{}_head_logps": (
    "head_logps",
    "log pi of the {} response's first n tokens, n the length of the pair's"
    " shorter response, nats",
  ),
  "ref_{}_head_logps": (
    "ref_head_logps",
    "the same of the {} response under the reference, nats",
  ),
  "policy_{}_sampled_logps": (
    "sampled_logps",
    "log pi of n tokens drawn from the {} response, n the length of the pair's"
    " shorter response, nats",
  ),
  "ref_{}_sampled_logps": (
    "ref_sampled_logps",
    "the same tokens of the {} response under the reference, nats",
  ),
  "{}_kl": (
    "kl",
    "KL(pi_ref || pi) summed over the {} response's positions, nats",
  ),
  "{}_alignment": (
    "alignment",
    "mean of log p(token) - log sum_v p(v)^2 over the {} response's tokens",
  ),
  "{}_complement_logps": (
    "complement_logps",
    "sum of log(1 - p(token)) over the {} response's tokens, nats",
  ),
}
_LOGPS = "log pi(y|x), summed over tokens, nats"
_REF_LOGPS = "log pi_ref(y|x), summed over tokens, nats"
_NUM_TOKENS = "tokens of each response, EOS included; 0 counts as 1"


def _slots(field: str, doc: str) -> Argument:
  return Argument(field, doc, slot=None, shape="B, K")


def _tokens(field: str, doc: str, *, is_bool: bool = False) -> Argument:
  return Argument(field, doc, slot=None, shape="B, K, M", is_bool=is_bool)


# Arguments by kind of group; a loss takes those that it reads, in this order.
ARGUMENTS: dict[str, dict[str, Argument]] = {
  "pair": {
    name.format(side): Argument(field, doc.format(side), slot)
    for name, (field, doc) in _PAIR_FIELDS.items()
    for slot, side in enumerate(("chosen", "rejected"))
  },
  "single": {
    "policy_logps": Argument("logps", _LOGPS),
    "ref_logps": Argument("ref_logps", _REF_LOGPS),
    "labels": Argument(
      "score", "whether a response is desirable", is_bool=True
    ),
  },
  "first": {
    "policy_logps": Argument("logps", _LOGPS),
    "num_tokens": Argument("num_tokens", _NUM_TOKENS),
  },
  "ranking": {
    "policy_logps": _slots("logps", f"{_LOGPS}, best response first"),
    "ref_logps": _slots("ref_logps", _REF_LOGPS),
    "values": _slots("values", "reward of each response, best response first"),
    "scores": _slots("score", "scores; equal ones have no order"),
  },
  "samples": {
    "policy_logps": _slots("logps", _LOGPS),
    "old_logps": _slots(
      "old_logps", "the same under the policy that sampled, nats"
    ),
    "scores": _slots("score", "reward of each response, KL penalty included"),
    "token_logps": _tokens("token_logps", "log pi of each token, nats"),
    "old_token_logps": _tokens(
      "old_token_logps", "the same under the policy that sampled, nats"
    ),
    "advantages": _tokens("advantages", "advantage of each token"),
    "token_values": _tokens("token_values", "value head at each token"),
    "old_token_values": _tokens(
      "old_token_values", "value head at each token when it was sampled"
    ),
    "returns": _tokens("returns", "target of the value head"),
    "token_mask": _tokens(
      "token_mask", "which tokens belong to the response", is_bool=True
    ),
    "num_tokens": _slots("num_tokens", _NUM_TOKENS),
  },
}


def evaluate(name: str, arguments: Mapping[str, Any]) -> jax.Array:
  """Computes a loss of the catalogue for every group.

  Args:
    name: loss that neither couples the batch nor has a state.
    arguments: arrays of `ARGUMENTS`, a value of every knob of the loss (there
      are no defaults), and `valid` (bool [B, K], which slots hold a response;
      None: all), by name. Every array that the loss may read has a name here;
      None stands for one not given. A name that no loss of this kind of group
      reads is ignored.

  Returns:
    f32 [B], 0 for a group with too few responses; the caller takes the mean.

  Raises:
    ValueError: a knob out of range; an array of another shape or dtype; an
      array that is missing, or that these knobs do not read.
  """
  row = CATALOGUE[name]
  known = ARGUMENTS[row.group]
  knobs = {k: _checked(row, k, v) for k, v in arguments.items() if k in KNOBS}
  given = {k: v for k, v in arguments.items() if k in known}
  _check_optional(row, given, knobs)
  arrays = {
    key: _as_array(key, value, known[key])
    for key, value in given.items()
    if value is not None
  }
  _check_shapes(arrays, known)
  shape = next(iter(arrays.values())).shape[:2]
  shape = (*shape[:1], *(shape[1:] or (GROUPS[row.group].num_slots,)))
  valid = arguments.get("valid")
  if valid is None:
    valid = jnp.ones(shape, bool)
  elif jnp.shape(valid) != shape or jnp.asarray(valid).dtype != bool:
    raise ValueError(
      f"valid must be bool {list(shape)}; got {jnp.asarray(valid).dtype}"
      f" {list(jnp.shape(valid))}"
    )
  fields = _fields(arrays, known, shape)
  sequences = Sequences(**fields, valid=jnp.asarray(valid))
  return Objective(row, knobs).losses(sequences)


def _checked(row: Loss, knob: str, value: Any) -> Any:
  """Checks the value of a knob and returns it, a 0-d array as a number.

  A traced value is not checked.

  Raises:
    ValueError: wrong type, or out of the row's range.
  """
  if isinstance(value, jax.core.Tracer):
    return value
  if jnp.ndim(value) == 0 and hasattr(value, "item"):
    value = value.item()
  row.check(knob, knob, value)
  return value


def _check_optional(
  row: Loss, given: Mapping[str, Any], knobs: Mapping[str, Any]
) -> None:
  known = ARGUMENTS[row.group]
  for key, value in given.items():
    is_read = row.is_read(known[key].field, knobs)
    if is_read == (value is not None):
      continue
    settings = ", ".join(
      f"{knob}={wanted!r}"
      for what, knob, wanted in row.conditions
      if what == known[key].field
    )
    if is_read:
      with_settings = f" with {settings}" if settings else ""
      raise ValueError(f"{key} is missing: the loss reads it{with_settings}")
    raise ValueError(
      f"{key} is given, but the loss reads it only with {settings}"
    )


def _as_array(key: str, value: Any, argument: Argument) -> jax.Array:
  array = jnp.asarray(value)
  is_real = jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(
    array.dtype, jnp.integer
  )
  if array.dtype != bool if argument.is_bool else not is_real:
    wanted = "bool" if argument.is_bool else "float"
    raise ValueError(f"{key} must be {wanted}; got {array.dtype}")
  return array if argument.is_bool else array.astype(jnp.float32)


def _check_shapes(
  arrays: Mapping[str, jax.Array], known: Mapping[str, Argument]
) -> None:
  """Raises ValueError unless all arrays agree on B, K and M."""
  sizes: dict[str, int] = {}
  for key, array in arrays.items():
    axes = known[key].shape.split(", ")
    wanted = [sizes.get(axis, axis) for axis in axes]
    if array.ndim != len(axes) or any(
      sizes.setdefault(axis, size) != size
      for axis, size in zip(axes, array.shape, strict=True)
    ):
      shape = ", ".join(map(str, wanted))
      raise ValueError(
        f"{key} must have the shape [{shape}]; got {list(array.shape)}"
      )


def _fields(
  arrays: Mapping[str, jax.Array],
  known: Mapping[str, Argument],
  shape: tuple[int, ...],
) -> dict[str, jax.Array]:
  """Returns the fields of Sequences that hold the given arrays.

  Slots that are not given, and `logps`, `ref_logps`, `num_tokens` and `score`
  where the loss does not read them, are ones.

  Args:
    arrays: arrays by name of the argument.
    known: ARGUMENTS of the kind of group.
    shape: (B, K).
  """
  slots: dict[str, list[jax.Array]] = {}
  fields = {}
  for key, array in arrays.items():
    argument = known[key]
    if argument.slot is None:
      fields[argument.field] = array
      continue
    column = jnp.ones(shape[:1], jnp.float32)
    columns = slots.setdefault(argument.field, [column] * shape[1])
    columns[argument.slot] = array.astype(jnp.float32)
  fields |= {field: jnp.stack(columns, 1) for field, columns in slots.items()}
  ones = jnp.ones(shape, jnp.float32)
  unread = ("logps", "ref_logps", "num_tokens", "score")
  return dict.fromkeys(unread, ones) | fields
