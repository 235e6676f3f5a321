"""Allowed values of each key: one table of types, ranges and choices.

The modules that implement the choices are below this one; a test compares them.
"""

from collections.abc import Mapping, Sequence
import re
from typing import Any

from dpo_jax.losses import Knob

# References that run in every step.
LIVE_REFERENCES = ("frozen", "adapter_off", "ema")


# Checks of the data: data/checks.py.
CHECKS = (
  *("broken", "identical", "empty", "prompts_cut", "responses_cut"),
  *("special_tokens", "duplicates", "contradictions", "ties"),
  *("chosen_scores_lower", "overlap", "length_bias", "few_held_out"),
  *("small_data", "default_scores"),
)

# Differences from the run of a workdir that `resume.allow` may accept:
# another value of a key, a schedule over other total_steps, other records,
# tokens made by another version, another tokenizer or chat template, other
# weights of the reference, and no checkpoint left of those that were saved.
DIFFERENCES = (
  *("config", "total_steps", "data", "format", "tokenizer", "reference"),
  "restart",
)

# Services that runs may be sent to: records/tracker.py.
TRACKERS = ("wandb", "trackio")


def _count(doc: str, low: int = 0) -> Knob:
  return Knob(int, doc, low=low)


def _choice(*choices: str) -> Knob:
  return Knob(str, choices=choices)


# A key that is absent may have any value of its default's type, or is checked
# by the module that reads it. Placeholders that are not set are not checked.
VALUES: dict[str, Knob] = {
  "seed": _count("seed"),
  "total_steps": _count("optimizer steps", 1),
  "epochs": Knob(float, "passes over the data", low=0, above=True),
  "batch_size": _count("groups a step", 1),
  "accumulation_steps": _count("parts of a batch", 1),
  "parallelism": _choice("jit", "pmap"),
  "logps_chunk": _count("scored tokens; 0 is as suits the device"),
  "policy.param_dtype": _choice("float32", "bfloat16"),
  "policy.compute_dtype": _choice("float32", "bfloat16"),
  "policy.remat": _choice("none", "attention", "dots", "full"),
  "policy.attention": _choice("auto", "xla", "splash", "triton", "dense"),
  "lora.rank": _count("rank of the adapters; 0 for none"),
  "lora.alpha": Knob(float, "scale is alpha / rank", low=0, above=True),
  "data.eval_fraction": Knob(
    float, "part of the prompts to hold out", low=0, high=1, below=True
  ),
  "data.scored_turns": _choice("last", "all"),
  "data.template_timeout_s": Knob(
    float, "seconds for 1,000 records", low=0, above=True, finite=False
  ),
  "data.special_tokens": _choice("letters", "read"),
  "data.max_broken_records": _count("broken records to leave out"),
  **{f"data.checks.{name}": _choice("off", "warn", "stop") for name in CHECKS},
  "data.max_tokens": _count("tokens of a prompt and its response", 2),
  "data.max_prompt_tokens": _count("tokens", 1),
  "data.row_tokens": _count("tokens of a row; 0 is one row a device"),
  "data.max_shapes": _count("shapes of batches", 1),
  "data.layout": _choice("shared", "packed", "padded"),
  "online.kind": _choice("none", "pairs", "rollouts"),
  "online.every_steps": _count("steps between samplings", 1),
  "online.epochs": _count("passes over what was sampled", 1),
  "online.num_samples": _count("responses to a prompt", 1),
  "online.max_response_tokens": _count("tokens, EOS included", 1),
  "online.max_kl": Knob(float, "nats a response", low=0, finite=False),
  "online.temperature": Knob(float, "0 is greedy", low=0),
  "online.label": _choice("argmax", "bradley_terry"),
  "online.flips": Knob(float, "part of the labels", low=0, high=0.5),
  "online.offline_fraction": Knob(
    float,
    "part of a batch that is read from the data; online.kind='none' reads all",
    low=0,
    high=1,
    above=True,
    below=True,
  ),
  "online.replay": Knob(bool, "draw batches from all samplings so far"),
  "online.kl_weight": Knob(float, "weight of a nat", low=0),
  "online.kl_target": Knob(float, "nats a response; 0 is none", low=0),
  "online.kl_gain": Knob(float, "gain of the KL controller", low=0, high=5),
  "online.discount": Knob(float, "of GAE", low=0, high=1),
  "online.gae_lambda": Knob(float, "of GAE", low=0, high=1),
  "reference.kind": _choice("auto", "cached", *LIVE_REFERENCES, "none"),
  "reference.alpha": Knob(
    float, "part of the policy in an update", low=0, high=1, above=True
  ),
  "reference.every_steps": _count("steps between updates", 1),
  "optimizer.name": _choice("adamw", "rmsprop", "adafactor", "lion", "muon"),
  "optimizer.learning_rate": Knob(float, "peak", low=0),
  "optimizer.schedule": _choice("constant", "cosine", "linear"),
  "optimizer.warmup_steps": _count("steps"),
  "optimizer.max_grad_norm": Knob(
    float, "global norm; inf clips nothing", low=0, above=True, finite=False
  ),
  "optimizer.weight_decay": Knob(float, low=0),
  "optimizer.b1": Knob(float, low=0, high=1, below=True),
  "optimizer.b2": Knob(float, low=0, high=1, below=True),
  "optimizer.epsilon": Knob(float, low=0),
  "numerics.max_log_ratio": Knob(
    float, "nats a response", low=0, above=True, finite=False
  ),
  "numerics.skip_spikes": Knob(float, "multiple of a median; 0 is off", low=0),
  "numerics.spike_window": _count("steps of that median", 2),
  "eval.every_steps": _count("steps; 0 is at the start and the end"),
  "eval.batch_size": _count("groups", 1),
  "eval.max_groups": _count("held-out groups; 0 is all"),
  "eval.num_samples": _count("responses"),
  "eval.samples_every_steps": _count("steps; 0 is at the start and the end"),
  "eval.max_response_tokens": _count("tokens, EOS included", 1),
  "eval.temperature": Knob(float, "0 is greedy", low=0),
  "eval.top_k": _count("tokens; 0 is all"),
  "eval.top_p": Knob(
    float, "nucleus mass; 1 leaves nothing out", low=0, high=1, above=True
  ),
  "eval.api.timeout_s": Knob(float, "seconds", low=0, above=True),
  "eval.api.max_tries": _count("tries", 1),
  "eval.api.num_parallel": _count("questions at a time", 1),
  "eval.api.max_tokens": _count("tokens of an answer", 1),
  "eval.api.max_left_out": Knob(float, "part of the questions", low=0, high=1),
  "eval.api.price_in": Knob(float, "dollars for a million tokens", low=0),
  "eval.api.price_out": Knob(float, "dollars for a million tokens", low=0),
  "checkpoint.every_steps": _count("steps; 0 is at the end"),
  "checkpoint.keep": _count(
    "the one before stays until the latest is whole", 2
  ),
  "hosts.start_timeout_s": Knob(float, "seconds", low=0, above=True),
  "hosts.peer_timeout_s": Knob(float, "seconds of silence", low=3),
  "log.every_steps": _count("steps", 1),
  "log.wandb_mode": _choice("auto", "online", "offline"),
  "resume.step": _count("step of a checkpoint", 1),
  "workdir.lock_timeout_s": Knob(
    float, "seconds without a sign of life", low=1
  ),
}


def parse_pairs(text: str, key: str, example: str) -> dict[str, str]:
  """Reads 'name=value,name=value'.

  Args:
    text: pairs; "" for none.
    key: path in the config, for errors.
    example: such a text, for errors.

  Returns:
    Values by name, in their order.

  Raises:
    ValueError: another spelling, or a name twice.
  """
  found = {}
  for item in filter(None, text.split(",")):
    name, equals, value = (part.strip() for part in item.partition("="))
    if not equals or not name or name in found:
      raise ValueError(
        f"{key}={text!r} must be NAME=VALUE, separated by commas, each name"
        f" once: {example!r}"
      )
    found[name] = value
  return found


def parse_allowed(text: str) -> frozenset[str]:
  """Reads `resume.allow`: some of DIFFERENCES, separated by commas.

  Raises:
    ValueError: another name.
  """
  return frozenset(_parse_names(text, "resume.allow", DIFFERENCES))


def parse_trackers(text: str) -> list[str]:
  """Reads `log.trackers`: some of TRACKERS, separated by commas.

  Raises:
    ValueError: another name.
  """
  return _parse_names(text, "log.trackers", TRACKERS)


def _parse_names(text: str, key: str, allowed: Sequence[str]) -> list[str]:
  """Reads names separated by commas, each once, in their order.

  Args:
    text: names; "" for none.
    key: path in the config, for errors.
    allowed: names that there are.

  Raises:
    ValueError: another name.
  """
  names = [part.strip() for part in text.split(",") if part.strip()]
  for name in names:
    if name not in allowed:
      raise ValueError(
        f"{key}={text!r}: {name!r} must be one of {', '.join(allowed)}"
      )
  return list(dict.fromkeys(names))


def check_sampling(settings: Mapping[str, Any]) -> None:
  """Checks that samples within a run are a part of an evaluation.

  Args:
    settings: `config.eval`.

  Raises:
    ValueError: no prompts to sample from, or steps that are not evaluated.
  """
  every, every_eval = settings["samples_every_steps"], settings["every_steps"]
  if every and not settings["num_samples"]:
    raise ValueError(
      f"eval.samples_every_steps={every} needs prompts: set eval.num_samples"
      " above 0"
    )
  if every and (not every_eval or every % every_eval):
    raise ValueError(
      f"eval.samples_every_steps={every} must be a multiple of"
      f" eval.every_steps={every_eval}: samples are a part of an evaluation"
    )


def parse_steps(text: str) -> range:
  """Reads `profile.steps`: '10:13' is steps 10, 11 and 12, '' is none.

  Raises:
    ValueError: not FIRST:LAST with FIRST below LAST.
  """
  if not text:
    return range(0)
  found = re.fullmatch(r"(\d+):(\d+)", text)
  if not found or int(found[1]) >= int(found[2]):
    raise ValueError(
      f"profile.steps={text!r} must be FIRST:LAST with FIRST < LAST, such as"
      " 10:13 for steps 10, 11 and 12"
    )
  return range(int(found[1]), int(found[2]))
