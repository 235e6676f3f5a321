"""Small configs, models and batches that tests share."""

import contextlib
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpo_jax import config as config_lib
from dpo_jax.data import batch_plan, packing
from dpo_jax.data import loader as loader_lib
from dpo_jax.data.packing import RowShape
from dpo_jax.data.store import Store
from dpo_jax.losses import build_objective
from dpo_jax.models.config import ModelConfig
from dpo_jax.models.decoder import Policy
from dpo_jax.models.presets import PRESETS
from dpo_jax.parallel import mesh as mesh_lib
from dpo_jax.parallel.placement import Placement
from dpo_jax.records import resume
from dpo_jax.training import forward, reference
from dpo_jax.training import program as program_lib
from dpo_jax.training import setup as run
from dpo_jax.types import Batch, Sequences


def make_config(**overrides):
  """A config that trains the tiny preset on one device in a second.

  Args:
    **overrides: keys with dots as double underscores: loss__beta=0.5.

  Returns:
    The complete config.
  """
  config = config_lib.default_config()
  config.policy.preset = "tiny"
  config.data.source = "synthetic:review_pairs:40"
  config.data.max_tokens = 160
  config.data.max_prompt_tokens = 80
  config.data.max_shapes = 1  # less to compile
  config.batch_size = 8
  config.total_steps = 4
  config.eval.batch_size = 8
  config.eval.every_steps = 0
  config.eval.max_groups = 8
  config.optimizer.name = "adamw"
  config.optimizer.learning_rate = 1e-3
  config.optimizer.warmup_steps = 0
  config.checkpoint.every_steps = 0
  config.log.every_steps = 1
  config.log.progress = False
  config.mesh = {"data": -1, "fsdp": 1, "tensor": 1}
  for key, value in overrides.items():
    *path, last = key.split("__")
    node = config
    for part in path:
      node = node[part]
    with node.ignore_type():
      node[last] = value
  return config


# Programs that runs have built, by what decides them.
_BUILT: dict[tuple, program_lib.Program] = {}
_make_logps_step = functools.cache(reference.make_logps_step)
_make_eval_step = functools.cache(forward.make_eval_step)


def _decides_program(config, key: str) -> bool:
  """Returns whether a config key may change what a run compiles."""
  if key == "total_steps":
    return config.optimizer.schedule != "constant"
  if key.startswith(("checkpoint.", "eval.")):
    return key == "eval.losses"
  return resume.decides_result(key) or key == "logps_chunk"


def _build_once(config, policy, placement) -> program_lib.Program:
  values = sorted(config_lib.flatten(config), key=lambda item: item[0])
  kept = [(k, v) for k, v in values if _decides_program(config, k)]
  key = repr(kept), policy, placement
  if key not in _BUILT:
    made = program_lib.build_program(config, policy, placement)
    object.__setattr__(made, "train_step", functools.cache(made.train_step))
    _BUILT[key] = made
  return _BUILT[key]


@contextlib.contextmanager
def shared_programs():
  """Lets runs of one process share what they compile, where it is the same.

  Tracing and lowering a program takes longer than a few of its steps, and no
  cache on the disk saves it.
  """
  with (
    mock.patch.object(run, "build_program", _build_once),
    mock.patch.object(reference, "make_logps_step", _make_logps_step),
    mock.patch.object(forward, "make_eval_step", _make_eval_step),
  ):
    yield


def make_policy(vocab_size: int = 96, **fields) -> Policy:
  """The tiny decoder."""
  return Policy(
    ModelConfig(vocab_size=vocab_size, **{**PRESETS["tiny"], **fields})
  )


def make_params(policy: Policy, seed: int = 0):
  """Random weights, large enough that attention and logits are not flat."""
  params = policy.init(jax.random.key(seed))
  return jax.tree.map(lambda x: 4.0 * x if x.ndim > 1 else x, params)


def make_groups(
  num: int, num_slots: int = 2, vocab_size: int = 96, seed: int = 0
) -> list[list[np.ndarray]]:
  """Groups of uneven lengths: each [prompt, response_0, ...] of i32 ids."""
  rng = np.random.default_rng(seed)

  def text(low, high):
    return rng.integers(0, vocab_size, rng.integers(low, high)).astype(np.int32)

  return [
    [text(1, 12), *(text(1, 15) for _ in range(num_slots))] for _ in range(num)
  ]


def pack(
  groups: list[list[np.ndarray]],
  layout: str = "shared",
  num_tokens: int = 64,
  num_rows: int | None = None,
  ref_logps: np.ndarray | None = None,
  token_masks: frozenset[str] = frozenset(),
  scored: list[list[np.ndarray]] | None = None,
) -> Batch:
  """Packs groups into rows of `num_tokens`."""
  lengths = np.array([[len(part) for part in group] for group in groups])
  num_slots = lengths.shape[1] - 1
  shape = RowShape(num_tokens, num_tokens, 8, num_slots)
  rows = packing.assign_rows(
    packing.group_tokens(lengths, layout),
    lengths[:, 1:].sum(1),
    shape=shape,
    layout=layout,
  )
  rows += [[]] * ((num_rows or len(rows)) - len(rows))
  score = np.tile(-np.arange(num_slots, dtype=np.float32), (len(groups), 1))
  return packing.fill_rows(
    rows,
    groups,
    score,
    np.arange(len(groups)),
    shape=shape,
    layout=layout,
    ref_logps=ref_logps,
    token_masks=token_masks,
    scored=scored,
  )


def make_sequences(
  num_slots: int, num: int = 6, seed: int = 0, scale: float = 5.0
) -> Sequences:
  """Random groups with every optional field, f32.

  Args:
    num_slots: K.
    num: B.
    seed: seed of the random numbers.
    scale: standard deviation of the log-ratios, nats.
  """
  rng = np.random.default_rng(seed)
  shape = (num, num_slots)
  n = rng.integers(1, 40, shape).astype(np.float32)
  logps = -n * rng.uniform(0.2, 2.0, shape)
  gaps = {k: rng.normal(0, scale, shape) for k in ("ref", "head", "sampled")}
  score = -np.sort(-rng.uniform(0, 4, shape), axis=1)
  if num_slots == 1:
    score = (np.arange(num) % 2).astype(float)[:, None]
  fields = {
    "logps": logps,
    "num_tokens": n,
    "score": score,
    "ref_logps": logps + gaps["ref"],
    "head_logps": 0.5 * logps,
    "ref_head_logps": 0.5 * logps + gaps["head"],
    "sampled_logps": 0.4 * logps,
    "ref_sampled_logps": 0.4 * logps + gaps["sampled"],
    "mismatched_logps": logps[:, 0] - 3.0,
    "mismatched_ref_logps": logps[:, 0] - 3.0 - rng.normal(4, 2, num),
    "complement_logps": -rng.uniform(0.1, 3.0, shape) * n,
    "alignment": -rng.uniform(0.0, 1.0, shape),
    "kl": rng.uniform(0, 3, shape),
    "values": rng.normal(0, 2, shape),
    "old_logps": logps + rng.normal(0, 0.3, shape),
    "sample_weight": np.ones(shape),
  }
  # Four tokens of each response, the last of some of them padding.
  fields |= {
    "token_logps": rng.uniform(-3, 0, (*shape, 4)),
    "old_token_logps": rng.uniform(-3, 0, (*shape, 4)),
    "token_values": rng.normal(0, 1, (*shape, 4)),
    "old_token_values": rng.normal(0, 1, (*shape, 4)),
    "advantages": rng.normal(0, 1, (*shape, 4)),
    "returns": rng.normal(0, 1, (*shape, 4)),
  }
  fields = {k: jnp.asarray(v, jnp.float32) for k, v in fields.items()}
  mask = np.arange(4) < rng.integers(1, 5, (*shape, 1))
  return Sequences(
    **fields, token_mask=jnp.asarray(mask), valid=jnp.ones(shape, bool)
  )


def make_masks(groups: list[list[np.ndarray]]) -> list[list[np.ndarray]]:
  """Which tokens of each response are scored: a few runs, never none."""
  rng = np.random.default_rng(1)
  masks = []
  for group in groups:
    masks.append([])
    for response in group[1:]:
      mask = rng.random(len(response)) < 0.5
      mask[rng.integers(len(response))] = True
      masks[-1].append(mask)
  return masks


def make_loader(
  groups: list[list[np.ndarray]],
  batch_size: int,
  *,
  indices: np.ndarray | None = None,
  layout: str = "shared",
  row_multiple: int = 1,
  ref_logps: np.ndarray | None = None,
) -> loader_lib.Loader:
  """A loader over a store of these groups."""
  ranks = np.arange(len(groups[0]) - 1, dtype=np.float32)
  store = Store.from_groups(groups, np.tile(-ranks, (len(groups), 1)))
  indices = np.arange(len(groups)) if indices is None else indices
  plan = batch_plan.make_plan(
    store,
    indices,
    batch_size=batch_size,
    row_tokens=0,
    row_multiple=row_multiple,
    layout=layout,
  )
  return loader_lib.Loader(
    store, indices, plan, batch_size, seed=0, ref_logps=ref_logps
  )


def make_placement(sizes: dict[str, int] | None = None) -> Placement:
  """A mesh of the first devices; of one unless told."""
  sizes = sizes or {"data": 1, "fsdp": 1, "tensor": 1}
  devices = jax.devices()[: int(np.prod(list(sizes.values())))]
  return Placement(mesh_lib.make_mesh(sizes, devices))


def make_program(
  policy: Policy, loss, placement: Placement, **fields
) -> program_lib.Program:
  """A program whose optimizer changes nothing."""
  return program_lib.Program(
    policy=policy,
    objective=build_objective(
      {"name": loss} if isinstance(loss, str) else loss
    ),
    optimizer=optax.set_to_zero(),
    schedule=optax.constant_schedule(0.0),
    placement=placement,
    chunk_size=16,
    **fields,
  )


def naive_logps(
  policy: Policy, params, groups: list[list[np.ndarray]]
) -> np.ndarray:
  """f64 [N, K]: each response alone after its prompt, all logits, a loop."""
  width = max(len(g[0]) + len(r) for g in groups for r in g[1:])
  rows = [np.concatenate([g[0], r]) for g in groups for r in g[1:]]
  tokens = np.stack([np.pad(row, (0, width - len(row))) for row in rows])
  is_token = np.arange(width) < np.array([[len(row)] for row in rows])
  positions = np.tile(np.arange(width, dtype=np.int32), (len(rows), 1))
  logits = _whole_logits(policy, params, tokens, positions, is_token)
  logits = np.asarray(logits, np.float64)
  out = []
  prompts = [g[0] for g in groups for _ in g[1:]]
  for prompt, row, row_logits in zip(prompts, rows, logits, strict=True):
    total = 0.0
    for place in range(len(prompt), len(row)):
      scores = row_logits[place - 1]
      total += scores[row[place]] - np.log(np.exp(scores).sum())
    out.append(total)
  return np.array(out).reshape(len(groups), -1)


@functools.partial(jax.jit, static_argnums=0)
def _whole_logits(policy, params, tokens, positions, is_token):
  hidden = policy.hidden_states(
    params,
    tokens,
    positions,
    is_token.astype(jnp.int32),
    jnp.zeros_like(tokens),
  )
  return policy.readout(params).logits(hidden)
