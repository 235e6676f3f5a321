"""A run trained with loss `reward_model`, as a judge."""

from collections.abc import Sequence
import functools
from typing import Any

import jax
import ml_collections
import numpy as np

from dpo_jax.data import packing
from dpo_jax.model_sources import TrainedRun
from dpo_jax.models import logps as logps_lib
from dpo_jax.parallel.hosts import to_host
from dpo_jax.parallel.mesh import make_mesh, on_mesh
from dpo_jax.parallel.placement import Placement


class RewardModel:
  """The value head of a trained run, as a judge.

  It returns f32 [n] for n > 0 prompts and responses. They are encoded as plain
  text, without a chat template, and cut to the run's `data.max_tokens`.
  """

  _ROWS = 64

  def __init__(self, workdir: str):
    """Checks that the run is one of a reward model.

    Args:
      workdir: run directory.

    Raises:
      FileNotFoundError: no run there.
      ValueError: a run of another loss.
    """
    try:
      self._run = TrainedRun.at(workdir)
    except FileNotFoundError as error:
      raise FileNotFoundError(
        f"reward:{workdir} must be the workdir of a run with"
        f" loss.name='reward_model': {error}"
      ) from error
    if not self._run.has_value_head:
      raise ValueError(
        f"reward:{workdir} has no value head: train it with"
        " loss.name='reward_model'"
      )
    self._config = self._run.config

  @functools.cached_property
  def _loaded(self) -> tuple[Any, Any, Placement, Any]:
    """Tokenizer, parameters, placement, and step (params, batch) -> rewards."""
    tokenizer = self._run.open_tokenizer()
    policy = self._run.policy(ml_collections.ConfigDict(self._config["policy"]))
    mesh = make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
    params = self._run.load(policy, mesh, seed=0)

    def step(params, batch):
      return logps_lib.response_figures(
        policy,
        params,
        None,
        batch,
        chunk_size=self._config["logps_chunk"],
        needs=frozenset({"values"}),
      )["values"]

    placement = Placement(mesh)
    jitted = jax.jit(step, out_shardings=placement.replicated)
    return tokenizer, params, placement, on_mesh(mesh)(jitted)

  def __call__(
    self, prompts: Sequence[str], responses: Sequence[str]
  ) -> np.ndarray:
    tokenizer, params, placement, step = self._loaded
    limit = self._config["data"]["max_tokens"]
    encode = functools.partial(tokenizer.encode, is_rendered=False)
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    groups = []
    for prompt, response in zip(
      encode(list(prompts), is_continuation=False),
      encode(list(responses), is_continuation=True),
      strict=True,
    ):
      response = [*response, tokenizer.eos_id]
      # As the store truncates: a prompt's beginning, then a response's end.
      keep = max(
        self._config["data"]["max_prompt_tokens"], limit - len(response)
      )
      prompt = [*begin, *prompt]
      if len(prompt) > keep:
        prompt = begin + prompt[len(prompt) - keep + len(begin) :]
      response = response[: limit - len(prompt)]
      groups.append([np.int32(prompt), np.int32(response)])
    shape = packing.RowShape(limit, limit, num_groups=1, num_slots=1)
    multiple = placement.num_row_shards
    num_rows = -(-self._ROWS // multiple) * multiple
    rewards = []
    for start in range(0, len(groups), num_rows):
      part = groups[start : start + num_rows]
      # One shape for all batches: rows left over are empty.
      rows = [[i] for i in range(len(part))]
      batch = packing.fill_rows(
        rows + [[]] * (num_rows - len(part)),
        part,
        np.zeros((len(part), 1), np.float32),
        np.arange(len(part)),
        shape=shape,
        layout="padded",
        ref_logps=None,
      )
      # Every process holds all rows, and places its own share.
      shares = jax.tree.map(
        lambda x: np.array_split(x, jax.process_count())[jax.process_index()],
        batch,
      )
      values = to_host(step(params, placement.place_rows(shares)))
      rewards.append(values.reshape(-1)[: len(part)])
    return np.concatenate(rewards)
