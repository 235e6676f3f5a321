"""Every key of a config, with its default and its unit.

`configs/*.py` start from `default_config()` and set what they change. A
placeholder is filled in by `resolve`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

from dpo_jax.config.values import CHECKS
from dpo_jax.losses import KNOBS


def loss_config(name: str) -> ml_collections.ConfigDict:
  """Returns the config of a loss, with a key for every knob of any loss.

  `reward`, `link` and the knobs are placeholders until set. The name is not
  checked.
  """
  config = ml_collections.ConfigDict({"name": name})
  # Names in losses/rewards.py and losses/links/, to replace the row's own.
  config.reward = config_dict.placeholder(str)
  config.link = config_dict.placeholder(str)
  for knob, meaning in KNOBS.items():
    config[knob] = config_dict.placeholder(meaning.type)
  return config


# Over 60 lines: a table of all keys, with a comment for each.
def default_config() -> ml_collections.ConfigDict:
  """Returns a config with all keys, each with its default or a placeholder."""
  config = ml_collections.ConfigDict()
  config.seed = 0  # seed of initial weights, data order and sampling
  # Optimizer steps, or passes over the training groups: one of the two may be
  # set. Neither: 1,000 steps.
  config.total_steps = config_dict.placeholder(int)
  config.epochs = config_dict.placeholder(float)
  config.batch_size = 64  # groups a step, over all devices (2305.18290 app. B)
  config.accumulation_steps = 1  # parts of a batch, one after the other
  config.parallelism = "jit"  # or "pmap": the same step, parameters replicated
  # Devices that split rows (data), rows and parameters (fsdp), heads and
  # features (tensor), the tokens of a row (context); -1: the rest.
  config.mesh = {"data": -1, "fsdp": 1, "tensor": 1, "context": 1}
  # Compiled programs, for the next start; "": ~/.cache/dpo_jax/compiled,
  # "off": none. JAX_COMPILATION_CACHE_DIR comes first.
  config.compilation_cache_dir = ""
  # Scored tokens of a row projected at once; 0: chosen by the device.
  config.logps_chunk = 0

  config.policy = ml_collections.ConfigDict()
  # Where the weights come from: "random", "hf:FOLDER" (a Hugging Face model),
  # "hub:ORG/NAME@REVISION" (one of the Hub), or "run:WORKDIR" (another run's
  # best checkpoint, adapters merged).
  config.policy.init = "random"
  config.policy.preset = "1m"  # shape of random weights: models/presets.py
  # Dtype of parameters that are not trained: the base of adapters, and those
  # that `frozen` matches. Trained ones are float32, so "bfloat16" is refused if
  # nothing is frozen.
  config.policy.param_dtype = "float32"
  config.policy.compute_dtype = "float32"  # dtype of matmuls and activations
  config.policy.remat = "dots"  # or "none", "attention", "full"
  # "auto" by platform and length; or "xla", "splash" (TPU), "triton" (GPU),
  # "dense": models/attention/rows.py
  config.policy.attention = "auto"
  # Regular expression; parameters whose path it matches are not trained.
  config.policy.frozen = ""

  # Adapters (arXiv:2106.09685): only they are trained. rank 0, or lora=None,
  # trains the policy itself.
  config.lora = ml_collections.ConfigDict()
  config.lora.rank = 0
  config.lora.alpha = 16.0  # their scale is alpha / rank
  # Regular expression over query key value attention_out gate up down.
  config.lora.targets = ".*"
  config.lora.rank_stabilized = False  # alpha / sqrt(rank): arXiv:2312.03732

  config.data = ml_collections.ConfigDict()
  # data/sources.py lists kinds. Unset, without sources: synthetic:review_pairs.
  config.data.source = config_dict.placeholder(str)
  # A mixture: ({"source": "jsonl:a.jsonl", "weight": 3.0}, ...). Weights are
  # shares of the groups of a batch.
  config.data.sources = ()
  config.data.eval_source = ""  # "": hold out a part of the training data
  # Several held-out sets by name: "helpful=jsonl:a.jsonl,other=jsonl:b.jsonl"
  config.data.eval_sources = ""
  config.data.eval_fraction = 0.05  # of prompts, where no held-out set is named
  # "": the tokenizer of policy.init, with its template, EOS and date; bytes
  # for random weights. Or "bytes", the folder of a tokenizer.json, "letters:N".
  config.data.tokenizer = ""
  config.data.chat_template = ""  # a jinja file; "": the tokenizer's own
  config.data.eos_token = ""  # spelling; "": what the tokenizer's folder says
  # Today, to a template that asks; "": as policy.init's run, or 2024-07-26.
  config.data.template_date = ""
  config.data.template_timeout_s = 600.0  # a chat template, 1,000 records
  # Of messages: the "last" assistant turn of a response, or "all" of them, and
  # of a demonstration all of the conversation's: data/examples.py.
  config.data.scored_turns = "last"
  # Shape of the records, one of data/formats.py; "": by their columns.
  config.data.format = ""
  # Names of columns, ours=theirs: "prompt=question,system=instructions".
  # "history=" leaves the column history out.
  config.data.columns = ""
  config.data.roles = ""  # of messages, theirs=ours: "human=user,bot=assistant"
  # Special tokens spelled in the data: "letters", or "read" as the tokens.
  config.data.special_tokens = "letters"
  config.data.max_broken_records = 0  # left out and logged; one more stops
  # Checks before training, data/checks.py: "off", "warn" or "stop".
  config.data.checks = dict.fromkeys(CHECKS, "warn")
  config.data.max_tokens = 512  # prompt + response (2305.18290's repository)
  config.data.max_prompt_tokens = 256  # kept of a prompt that is too long
  # Pairs become two responses with a label each, for a loss that reads those.
  config.data.split_pairs = True
  config.data.row_tokens = 0  # of a packed row; 0: one row for each device
  config.data.max_shapes = 4  # of batches, each compiled; fewer pad more
  config.data.layout = "shared"  # or "packed", "padded": data/packing.py
  config.data.cache_dir = ""  # token stores; "": ~/.cache/dpo_jax

  config.loss = loss_config("dpo")

  # Responses sampled from the policy: online/loader.py. Their prompts are those
  # of data.source. A kind fills in the knobs it reads; other knobs are refused.
  config.online = ml_collections.ConfigDict()
  # "none"; "pairs": labelled by a judge, for a loss of pairs; "rollouts":
  # rewarded by a judge, for `ppo` and `reinforce`.
  config.online.kind = "none"
  config.online.judge = config_dict.placeholder(str)  # judges/get_judge.py
  config.online.every_steps = config_dict.placeholder(int)  # between samplings
  config.online.epochs = config_dict.placeholder(int)  # over the samples
  config.online.num_samples = config_dict.placeholder(int)  # per prompt
  config.online.max_response_tokens = config_dict.placeholder(int)  # with EOS
  config.online.max_kl = config_dict.placeholder(float)  # nats; stops above it
  config.online.temperature = config_dict.placeholder(float)  # pairs only
  config.online.label = config_dict.placeholder(str)  # argmax, bradley_terry
  config.online.flips = config_dict.placeholder(float)  # wrong labels, of 1
  # Of pairs: the part of each batch that is read from data.source, in (0, 1),
  # a whole number of groups; the policy's own pairs are the rest. Unset: 0.
  config.online.offline_fraction = config_dict.placeholder(float)
  # Of pairs: whether batches are drawn from those of all samplings so far, not
  # of the latest alone. Unset: False.
  config.online.replay = config_dict.placeholder(bool)
  # Weight of a nat of KL to the reference: in the reward of rollouts, or, with
  # pairs, of a term of the loss on the policy's own samples (2406.01462).
  config.online.kl_weight = config_dict.placeholder(float)
  # A KL per response that kl_weight is adapted to (arXiv:1909.08593), nats;
  # 0: kl_weight stays as it is.
  config.online.kl_target = config_dict.placeholder(float)
  config.online.kl_gain = config_dict.placeholder(float)  # of that adaptation
  config.online.discount = config_dict.placeholder(float)  # of GAE
  config.online.gae_lambda = config_dict.placeholder(float)  # of GAE

  config.reference = ml_collections.ConfigDict()
  # "cached": log-probs computed once; "frozen": a copy runs in every step;
  # "adapter_off": the policy without its adapters, at no memory; "ema": a copy
  # that follows the policy (TR-DPO); "none": for losses that read no reference.
  # "auto" is "none" if the loss reads no reference, "cached" if it reads only
  # summed log-probs, and otherwise "adapter_off" or "frozen".
  config.reference.kind = "auto"
  # TR-DPO (arXiv:2404.09656): every so many steps the reference becomes
  # alpha * policy + (1 - alpha) * reference; 1 is a hard update.
  config.reference.alpha = config_dict.placeholder(float)  # ema only: 0.6
  config.reference.every_steps = config_dict.placeholder(int)  # ema only: 512
  config.reference.init = ""  # as policy.init; "": the policy's own start
  config.reference.cache_dir = ""  # "": WORKDIR/reference

  config.optimizer = ml_collections.ConfigDict()
  # 2305.18290 app. B; or "adamw", "adafactor", "lion", "muon" (on a layer's
  # matrices, and adamw on the rest: training/muon.py).
  config.optimizer.name = "rmsprop"
  config.optimizer.learning_rate = 1e-6  # peak (2305.18290 app. B)
  config.optimizer.schedule = "constant"  # or "cosine", "linear", to zero
  config.optimizer.warmup_steps = 150  # linear (2305.18290 app. B)
  config.optimizer.max_grad_norm = 10.0  # global norm; inf: no clipping
  config.optimizer.weight_decay = 0.0  # decoupled; not on norm scales
  config.optimizer.b1 = 0.9  # adamw, lion, muon's adamw
  config.optimizer.b2 = 0.95  # adamw, lion, muon's adamw
  config.optimizer.epsilon = 1e-8  # adamw, rmsprop, muon's adamw

  config.numerics = ml_collections.ConfigDict()
  # A response whose log-ratio of policy to reference is larger stops the run,
  # as a loss that is not finite does. Nats; inf: no limit.
  config.numerics.max_log_ratio = 1000.0
  # A step whose gradient norm is above this multiple of the median of the
  # latest steps is skipped: training/spikes.py. 0: none is.
  config.numerics.skip_spikes = 0.0
  config.numerics.spike_window = 100  # steps of that median

  config.eval = ml_collections.ConfigDict()
  config.eval.every_steps = 100  # 0: at the start and the end only
  config.eval.batch_size = 64  # groups
  # Other losses to measure, from the same forward pass: ("ipo", "kto").
  config.eval.losses = ()
  config.eval.save_logps = True  # of every group: see experiments/replay.py
  config.eval.max_groups = 0  # held-out groups to read; 0: all
  config.eval.num_samples = 0  # responses sampled at the start and the end
  # Steps between samples of the same prompts, a multiple of eval.every_steps;
  # 0: at the start and the end only.
  config.eval.samples_every_steps = 0
  config.eval.max_response_tokens = 128  # of a sample, EOS included
  config.eval.temperature = 1.0  # 0: greedy
  config.eval.top_k = 0  # 0: all tokens
  config.eval.top_p = 1.0  # nucleus mass
  # As online.judge, or "api:MODEL", a model on a server that compares the
  # responses of policy and reference. "": samples are not judged.
  config.eval.judge = ""
  config.eval.judge_prompt = ""  # file of api's question; "": judges/api.py
  # Server of "api:MODEL", with OpenAI's interface: docs/evaluate.md.
  config.eval.api = ml_collections.ConfigDict()
  config.eval.api.url = ""  # such as "http://localhost:8000/v1"
  # Environment variable that holds the key; "": the server needs none.
  config.eval.api.key_variable = "OPENAI_API_KEY"
  config.eval.api.cache_dir = ""  # answers; "": ~/.cache/dpo_jax/judge
  config.eval.api.timeout_s = 60.0  # without a byte of the server
  config.eval.api.max_tries = 6  # of a question, after faults that may pass
  config.eval.api.num_parallel = 8  # questions at a time
  config.eval.api.max_tokens = 64  # of an answer
  # Fields of a request, as JSON: '{"seed": 1}'; null leaves one out.
  config.eval.api.extra_body = ""
  config.eval.api.max_left_out = 0.1  # of the questions, without an answer
  # Dollars for a million tokens of questions and answers; 0: not known.
  config.eval.api.price_in = 0.0
  config.eval.api.price_out = 0.0

  config.checkpoint = ml_collections.ConfigDict()
  config.checkpoint.every_steps = 500  # 0: at the end only
  # Number of latest checkpoints to keep, in addition to the best. At least 2,
  # because the one before stays until the latest has its manifest.
  config.checkpoint.keep = 2
  # Metric of the best checkpoint: "eval/loss", or "NAME:loss" of a held-out set
  # with a name. Unset: the accuracy on the first set; of SFT the lowest loss;
  # of PPO and RLOO "eval/sample/reward". "": the latest checkpoint.
  config.checkpoint.best_metric = config_dict.placeholder(str)
  config.checkpoint.best_is_lower = config_dict.placeholder(bool)

  # Of one start: no part of the run, and not recorded with it.
  config.resume = ml_collections.ConfigDict()
  # Differences from what the workdir holds to accept, such as
  # "data,total_steps"; config/values.py lists them.
  config.resume.allow = ""
  # Checkpoint to go back to; later ones are moved to quarantine/.
  config.resume.step = config_dict.placeholder(int)

  config.hosts = ml_collections.ConfigDict()
  # Seconds to wait at the start for the processes of all hosts.
  config.hosts.start_timeout_s = 120.0
  # Seconds of silence, or of being stopped, after which a process is lost and
  # the others end: parallel/watcher.py. JAX's own limit is twice as long.
  config.hosts.peer_timeout_s = 12.0

  config.log = ml_collections.ConfigDict()
  config.log.every_steps = 10
  config.log.tensorboard = False  # event files in WORKDIR/tensorboard
  # Services that the run is sent to: "wandb", "trackio" or "wandb,trackio".
  config.log.trackers = ""
  config.log.project = "dpo_jax"  # of the trackers
  config.log.run_name = ""  # in the trackers; "": the workdir's last part
  config.log.wandb_mode = "auto"  # as WANDB_MODE says; or "online", "offline"
  # Bars on a terminal; elsewhere a line a minute of what takes long.
  config.log.progress = True

  config.workdir = ml_collections.ConfigDict()
  # A process on another machine that trained this workdir, and gave no sign of
  # life for so many seconds, is gone; one gives three in that time.
  config.workdir.lock_timeout_s = 30.0

  config.profile = ml_collections.ConfigDict()
  config.profile.steps = ""  # "10:13" traces steps 10 to 12: WORKDIR/profile
  return config


def flatten(
  config: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
  """Yields path and value of every leaf, such as ('loss.beta', 0.1).

  Args:
    config: config, or a part of one. Lists are leaves.
    prefix: text to put before each path, such as 'loss.'.
  """
  for key, value in config.items():
    if isinstance(value, Mapping | ml_collections.ConfigDict):
      yield from flatten(value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}", value
