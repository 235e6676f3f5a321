"""A policy that answers prompts: its weights on this machine's devices."""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import itertools
from typing import Any

import jax
import ml_collections
import numpy as np

from dpo_jax import config as config_lib
from dpo_jax import model_sources
from dpo_jax.data.encoding import encode_prompt
from dpo_jax.data.messages import Message
from dpo_jax.data.tokenizers import Tokenizer
from dpo_jax.models import generate
from dpo_jax.models.config import DTYPES
from dpo_jax.models.decoder import Policy
from dpo_jax.parallel import mesh
from dpo_jax.parallel.placement import Placement
from dpo_jax.training import reference, samples

Prompt = str | Sequence[Message]
# What a decoder gives for a character that has not arrived as a whole.
_PARTIAL = "\N{REPLACEMENT CHARACTER}"
_BATCH_SIZE = 64


@dataclasses.dataclass(frozen=True)
class Answer:
  """Response of a policy to a prompt.

  Attributes:
    prompt: text, or messages.
    text: response, decoded.
    prompt_ids: token ids of the prompt.
    ids: token ids of the response, a stop id at its end included.
    is_complete: whether the last id is a stop id; otherwise it was cut off.
  """

  prompt: Prompt
  text: str
  prompt_ids: list[int]
  ids: list[int]
  is_complete: bool


@dataclasses.dataclass(frozen=True)
class OpenPolicy:
  """A policy with its parameters and its tokenizer.

  Attributes:
    name: spelling of its source.
    policy: the decoder, adapters merged.
    params: parameters, split over the devices.
    tokenizer: tokenizer of the model, or of the run.
    placement: mesh.
    logps_chunk: scored tokens of a chunk, see `config.logps_chunk`.
  """

  name: str
  policy: Policy
  params: Any
  tokenizer: Tokenizer
  placement: Placement
  logps_chunk: int

  @classmethod
  def open(cls, init: str, *, dtype: str = "", key: str = "") -> "OpenPolicy":
    """Loads a policy onto the devices of this machine.

    Args:
      init: `hf:FOLDER`, `hub:ORG/NAME@REVISION` or `run:WORKDIR`.
      dtype: dtype of weights and matmuls; "" is that of the run, otherwise
        bfloat16 on an accelerator, and float32 on a CPU.
      key: flag that named it, for errors.

    Raises:
      ValueError: random weights, an unknown spelling or dtype, or a model
        without a tokenizer.
      FileNotFoundError: no such model, or a run without a checkpoint.
    """
    if dtype and dtype not in DTYPES:
      raise ValueError(f"--dtype={dtype} must be one of {', '.join(DTYPES)}")
    if init == "random":
      raise ValueError(f"{key}=random: random weights have nothing to say")
    source = model_sources.parse(init, key)
    defaults = config_lib.default_config()
    chunk, settings = defaults.logps_chunk, defaults.policy
    data: Any = defaults.data
    if isinstance(source, model_sources.TrainedRun):
      chunk, data = source.config["logps_chunk"], source.config["data"]
      settings = ml_collections.ConfigDict(source.config["policy"])
    elif not dtype:
      dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if dtype:
      settings.param_dtype = settings.compute_dtype = dtype
    tokenizer_settings = source.tokenizer_settings(data)
    if not tokenizer_settings["tokenizer"]:
      raise ValueError(f"{key}={init} has no tokenizer: add its files")
    policy = source.policy(settings)
    placement = Placement(mesh.make_mesh({"data": 1, "fsdp": -1, "tensor": 1}))
    params = source.load(policy, placement.mesh, seed=0)
    tokenizer = model_sources.open_tokenizer(tokenizer_settings)
    return cls(init, policy, params, tokenizer, placement, chunk)

  def sampling(
    self, *, max_response_tokens: int, temperature: float, **filters: Any
  ) -> generate.Sampling:
    """Returns settings of sampling, with the ends that the tokenizer has.

    Args:
      max_response_tokens: see `generate.Sampling`.
      temperature: see there.
      **filters: top_k and top_p.
    """
    return generate.Sampling(
      max_response_tokens, temperature, self.tokenizer.stop_ids, **filters
    )

  def encode(self, prompt: Prompt) -> list[int]:
    """Encodes a prompt as those of the data; see `encode_prompt`."""
    return encode_prompt(prompt, self.tokenizer)

  def sample(
    self,
    prompts: Sequence[Prompt],
    settings: generate.Sampling,
    *,
    seed: int,
    label: str = "",
  ) -> Iterator[Answer]:
    """Answers prompts in batches, split over the devices, and yields each.

    Args:
      prompts: texts, or messages.
      settings: settings of sampling.
      seed: seed of the whole call.
      label: name of the work for `progress.track`; "" shows nothing.

    Raises:
      ValueError: an empty prompt, or one too long for the model.
    """
    prompt_ids = [self.encode(prompt) for prompt in prompts]
    batches = generate.sample_batches(
      self.policy,
      self.params,
      prompt_ids,
      settings,
      seed=seed,
      batch_size=_BATCH_SIZE,
      rows=self.placement.row_sharding,
      label=label,
    )
    responses = itertools.chain.from_iterable(batches)
    for one in zip(prompts, prompt_ids, responses, strict=True):
      yield self._answer(*one)

  def stream(
    self,
    prompt: Prompt,
    settings: generate.Sampling,
    *,
    seed: int,
    index: int = 0,
  ) -> Iterator[str | Answer]:
    """Answers one prompt: yields texts as they come, and last the answer.

    Args:
      prompt: text, or messages.
      settings: settings of sampling.
      seed: seed of the whole call.
      index: index of the prompt in the call.

    Raises:
      ValueError: an empty prompt, or one too long for the model.
    """
    prompt_ids = self.encode(prompt)
    ids: list[int] = []
    shown = ""
    for token in generate.stream(
      self.policy,
      self.params,
      prompt_ids,
      settings,
      seed=seed,
      index=index,
      rows=self.placement.row_sharding,
    ):
      ids.append(token)
      text = self._decode(prompt_ids, ids)
      if text.startswith(shown) and not text.endswith(_PARTIAL):
        yield text[len(shown) :]
        shown = text
    answer = self._answer(prompt, prompt_ids, ids)
    if answer.text.startswith(shown):
      yield answer.text[len(shown) :]
    yield answer

  def logps(self, answers: Sequence[Answer]) -> np.ndarray:
    """Computes the log-prob of each response, in nats: f32 [n]."""
    shards = self.placement.num_row_shards
    size = min(_BATCH_SIZE, len(answers))
    return samples.score_responses(
      self._logps_step,
      self.params,
      [answer.prompt_ids for answer in answers],
      [answer.ids for answer in answers],
      self.placement,
      batch_size=-(-size // shards) * shards,
    )

  @functools.cached_property
  def _logps_step(self) -> Any:
    return reference.make_logps_step(
      self.policy, self.placement, self.logps_chunk
    )

  def _answer(
    self, prompt: Prompt, prompt_ids: list[int], ids: list[int]
  ) -> Answer:
    is_complete = bool(ids) and ids[-1] in self.tokenizer.stop_ids
    text = self._decode(prompt_ids, ids)
    return Answer(prompt, text, prompt_ids, ids, is_complete)

  def _decode(self, prompt_ids: list[int], ids: list[int]) -> str:
    """Decodes a response as it continues its prompt.

    Some tokenizers drop a space at the beginning of a text.
    """
    before = self.tokenizer.decode(prompt_ids)
    whole = self.tokenizer.decode([*prompt_ids, *ids])
    if not whole.startswith(before):
      return self.tokenizer.decode(ids)
    return whole[len(before) :]
