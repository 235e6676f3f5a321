"""Who says how good a response is.

  sentiment          the true reward of the built-in reviews
  table:FILE         rewards by prompt and response: a JSONL file
  reward:WORKDIR     a run that was trained with loss `reward_model`
  classifier:FILE    a text classifier trained here, see classifier.py

A judge reads texts, many at once, and gives a number for each. What it gives
is checked: one finite number for every response, or the run stops.
"""

from collections.abc import Callable, Sequence
import functools
import json
from typing import Any

import jax
import ml_collections
import numpy as np

from dpo_jax import files
from dpo_jax.classifier import Classifier
from dpo_jax.data import packing, synthetic
from dpo_jax.mesh import Placement, make_mesh, on_mesh
from dpo_jax.model_source import TrainedRun
from dpo_jax.models import logps as logps_lib
from dpo_jax.scoring import to_host

# (prompts, responses) -> a reward for each, higher is better.
Judge = Callable[[Sequence[str], Sequence[str]], Any]

KINDS = ("sentiment", "table:FILE", "reward:WORKDIR", "classifier:FILE")


def get_judge(name: str, *, key: str = "eval.judge") -> Judge | None:
  """Looks a judge up; '' is none.

  Args:
    name: one of KINDS.
    key: of the config, for errors.

  Returns:
    The judge. A reward model's weights are loaded when it is first asked.

  Raises:
    ValueError: an unknown name.
    FileNotFoundError: no such file or run.
  """
  if not name:
    return None
  kind, _, where = name.partition(":")
  if kind == "sentiment" and not where:
    return per_text(lambda prompt, response: synthetic.sentiment(response))
  if kind == "table" and where:
    return read_table(where)
  if kind == "reward" and where:
    return RewardModel(where)
  if kind == "classifier" and where:
    logits = Classifier.read(where).logits
    # Prompt and response as one text.
    return lambda prompts, responses: logits(
      [p + r for p, r in zip(prompts, responses, strict=True)]
    )
  raise ValueError(f"{key}={name!r} must be '' or one of {', '.join(KINDS)}")


def per_text(function: Callable[[str, str], float]) -> Judge:
  """A judge of a function of one prompt and one response."""

  def judge(prompts, responses):
    pairs = zip(prompts, responses, strict=True)
    return [function(prompt, response) for prompt, response in pairs]

  return judge


def ask(
  judge: Judge,
  prompts: Sequence[str],
  responses: Sequence[str],
  *,
  key: str = "eval.judge",
) -> np.ndarray:
  """Rewards of responses, or an error that says what the judge did.

  Args:
    judge: who is asked.
    prompts: texts.
    responses: texts, one to each prompt.
    key: of the config, for errors.

  Returns:
    f64 [n], finite.

  Raises:
    ValueError: not one finite number for each response.
  """
  given = judge(prompts, responses)
  try:
    rewards = np.asarray(given, np.float64)
  except (TypeError, ValueError):
    rewards = None
  if rewards is None or rewards.shape != (len(responses),):
    raise ValueError(
      f"{key} must give one number for each of {len(responses)} responses, and"
      f" gave {_short(given)}"
    )
  bad = np.flatnonzero(~np.isfinite(rewards))
  if len(bad):
    raise ValueError(
      f"{key} gave {rewards[bad[0]]} for {responses[bad[0]]!r}: a reward must"
      " be finite"
    )
  return rewards


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 80 else f"{text[:77]}..."


def read_table(path: str) -> Judge:
  """The judge that knows its rewards by heart.

  Args:
    path: JSONL of {"prompt", "response", "reward"}.

  Returns:
    A judge that refuses what the table does not hold.

  Raises:
    ValueError: a line that is no such object.
  """
  table: dict[tuple[str, str], float] = {}
  with files.existing(path).open("r") as file:
    for number, line in enumerate(file, 1):
      try:
        row = json.loads(line)
        table[row["prompt"], row["response"]] = float(row["reward"])
      except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
          f'{path}:{number}: not {{"prompt", "response", "reward"}}: {error!r}'
        ) from error

  def look_up(prompt: str, response: str) -> float:
    if (prompt, response) not in table:
      raise ValueError(
        f"{path} has no reward for the response {response!r} to {prompt!r}"
      )
    return table[prompt, response]

  return per_text(look_up)


class RewardModel:
  """The value head of a trained run, as a judge."""

  _ROWS = 64

  def __init__(self, workdir: str):
    """Checks that the run is one of a reward model.

    Args:
      workdir: of the run.

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
    """Tokenizer, parameters, mesh and the compiled step."""
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

    placement = Placement(mesh, "jit")
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
      # As the store cuts: a prompt's beginning, then a response's end.
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
      # One shape for all: what is over is empty rows.
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
      # Every process has all rows, and gives its own devices its share.
      shares = jax.tree.map(
        lambda x: np.array_split(x, jax.process_count())[jax.process_index()],
        batch,
      )
      values = to_host(step(params, placement.place_rows(shares)))
      rewards.append(values.reshape(-1)[: len(part)])
    return np.concatenate(rewards)


def bootstrap_interval(
  values: Sequence[float], *, seed: int = 0, num_draws: int = 2000
) -> tuple[float, float]:
  """95 % interval of a mean: the percentile bootstrap, Efron 1979.

  Args:
    values: one for each prompt, which are what is drawn again.
    seed: of the draws.
    num_draws: of them.

  Returns:
    Lower and upper bound.

  Raises:
    ValueError: no values.
  """
  values = np.asarray(values, np.float64)
  if not len(values):
    raise ValueError("an interval needs at least one value")
  rng = np.random.default_rng(seed)
  draws = rng.integers(0, len(values), (num_draws, len(values)))
  low, high = np.quantile(values[draws].mean(1), (0.025, 0.975))
  return float(low), float(high)


def win_rate(rewards: np.ndarray, others: np.ndarray) -> dict[str, float]:
  """How often responses beat others to the same prompts, ties a half.

  Args:
    rewards: f64 [n].
    others: f64 [n].

  Returns:
    `win_rate` and its 95 % bootstrap bounds, `win_rate_low` and `_high`.
  """
  wins = 0.5 * (np.sign(np.asarray(rewards) - np.asarray(others)) + 1.0)
  low, high = bootstrap_interval(wins)
  return {
    "win_rate": float(wins.mean()),
    "win_rate_low": low,
    "win_rate_high": high,
  }


def compare_in_both_orders(
  compare: Callable[[str, str, str], float],
  prompts: Sequence[str],
  responses: Sequence[str],
  others: Sequence[str],
) -> dict[str, float]:
  """Win rate by a judge that sees both, and may favour the first it sees.

  Each pair is shown in both orders and its result is the mean of the two, so a
  judge that always takes the first gives every pair a half.

  Args:
    compare: (prompt, first, second) -> probability in [0, 1] that the first
      is better.
    prompts: texts.
    responses: one to each prompt.
    others: what they are held against.

  Returns:
    `win_rate` with its 95 % bootstrap bounds, and `order_bias`: how much more
    often a response wins as the first than as the second.

  Raises:
    ValueError: a judge that gives no probability.
  """
  firsts, seconds = [], []
  for prompt, ours, theirs in zip(prompts, responses, others, strict=True):
    firsts.append(_probability(compare(prompt, ours, theirs), ours))
    seconds.append(1.0 - _probability(compare(prompt, theirs, ours), theirs))
  wins = 0.5 * (np.array(firsts) + np.array(seconds))
  low, high = bootstrap_interval(wins)
  return {
    "win_rate": float(wins.mean()),
    "win_rate_low": low,
    "win_rate_high": high,
    "order_bias": float(np.mean(firsts) - np.mean(seconds)),
  }


def _probability(value: Any, response: str) -> float:
  is_number = isinstance(value, int | float | np.floating | np.integer)
  if not is_number or not 0.0 <= value <= 1.0:  # NaN included
    raise ValueError(
      f"the judge gave {_short(value)} for {response!r} as the first of two: it"
      " must be a probability in [0, 1]"
    )
  return float(value)
