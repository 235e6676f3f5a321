"""Makes the golden values of this folder with other implementations.

  pip install -r requirements-parity.txt "trl==1.16.0" accelerate datasets
  python -m tests.golden.make

losses.json holds losses and gradients that TRL's own code computes on random
log-probs, in float64. `DPOTrainer._compute_loss` and `CPOTrainer.cpo_loss` run
as they are; the model under them returns the log-probs that it is given. TRL's
alpha-divergence takes no float64, and is left out.

families.json and families.npz hold logits that transformers computes for a
small model of each family. Its weights are drawn from numpy, so the test draws
them again and needs neither file of weights nor torch.
"""

import json
import pathlib
import tempfile
from types import SimpleNamespace
from typing import Any
import zlib

import numpy as np

FOLDER = pathlib.Path(__file__).parent
_NUM_PAIRS = 6
# (our name, our knobs, TRL's loss_type, TRL's other settings)
_DPO_CASES: tuple[tuple[str, dict, str, dict], ...] = (
  ("dpo", dict(beta=0.05), "sigmoid", {}),
  ("dpo", dict(beta=0.5), "sigmoid", {}),
  ("robust_dpo", dict(beta=0.1, label_smoothing=0.1), "robust", {}),
  ("robust_dpo", dict(beta=0.1, label_smoothing=0.3), "robust", {}),
  ("hinge", dict(beta=0.1), "hinge", {}),
  ("ipo", dict(tau=0.1, length_normalize=True), "ipo", dict(beta=0.1)),
  ("ipo", dict(tau=0.4, length_normalize=True), "ipo", dict(beta=0.4)),
  ("exo", dict(beta=0.1, label_smoothing=0.001), "exo_pair", {}),
  ("nca", dict(beta=0.1), "nca_pair", {}),
  ("sppo_hard", dict(beta=0.1), "sppo_hard", {}),
  ("aot", dict(beta=0.1, label_smoothing=0.0), "aot", {}),
  ("aot", dict(beta=0.1, label_smoothing=0.2), "aot", {}),
  ("aot_unpaired", dict(beta=0.1, label_smoothing=0.2), "aot_unpaired", {}),
  ("apo_zero", dict(beta=0.1), "apo_zero", {}),
  ("apo_down", dict(beta=0.1), "apo_down", {}),
  ("discopop", dict(beta=0.05, tau=0.05), "discopop", {}),
  ("length_normalized_dpo", dict(beta=5.0), "sigmoid_norm", {}),
  ("ld_dpo", dict(beta=0.1, alpha=0.3), "sigmoid", dict(ld_alpha=0.3)),
  ("wpo", dict(beta=0.01), "sigmoid", dict(use_weighting=True)),
  (
    "f_dpo",
    dict(beta=0.1, divergence="forward_kl"),
    "sigmoid",
    dict(f_divergence_type="forward_kl"),
  ),
  (
    "f_dpo",
    dict(beta=0.1, divergence="jensen_shannon"),
    "sigmoid",
    dict(f_divergence_type="js_divergence"),
  ),
)
# (our name, our knobs, alpha of TRL's CPO trainer)
_CPO_CASES = (
  ("simpo", dict(beta=2.0, gamma_over_beta=0.5), 0.0),
  ("alphapo", dict(beta=2.0, gamma_over_beta=0.5, alpha=0.25), 0.25),
)
# These sort the batch: one value for all of it.
_COUPLED = ("aot", "aot_unpaired")


def draw_fields() -> dict[str, np.ndarray]:
  """Draws random pairs: f64 [N, 2] each, slot 0 chosen."""
  rng = np.random.default_rng(0)
  shape = (_NUM_PAIRS, 2)
  num_tokens = rng.integers(1, 40, shape).astype(float)
  logps = -num_tokens * rng.uniform(0.2, 2.0, shape)
  ref_logps = logps + rng.normal(0.0, 3.0, shape)
  # All tokens of a response are alike, so the first ones have their share.
  shared = num_tokens.min(1, keepdims=True) / num_tokens
  return {
    "logps": logps,
    "ref_logps": ref_logps,
    "num_tokens": num_tokens,
    "head_logps": logps * shared,
    "ref_head_logps": ref_logps * shared,
    "alignment": -rng.uniform(0.0, 1.0, shape),
  }


def _dpo_trainer(loss_type: str, settings: dict[str, Any]) -> SimpleNamespace:
  """Builds what `DPOTrainer._compute_loss` reads of its trainer."""

  class Metrics(dict):
    def __missing__(self, key):
      return self.setdefault(key, [])

  trainer = {
    "accelerator": SimpleNamespace(
      device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x
    ),
    "args": SimpleNamespace(discopop_tau=settings.pop("tau", 0.05)),
    "model": SimpleNamespace(training=False),
    "aux_loss_enabled": False,
    "precompute_ref_logps": True,
    "ld_alpha": None,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "label_smoothing": 0.0,
    "use_weighting": False,
    "loss_types": [loss_type],
    "loss_weights": [1.0],
    "_metrics": {"eval": Metrics()},
    "_total_train_tokens": 0,
  }
  return SimpleNamespace(**{**trainer, **settings})


def _trl_dpo(
  fields: dict[str, np.ndarray],
  knobs: dict[str, Any],
  loss_type: str,
  settings: dict[str, Any],
) -> tuple[float, np.ndarray]:
  """Computes a batch's mean loss and its gradient with TRL.

  Args:
    fields: those of `draw_fields`, of the pairs of one batch.
    knobs: our knobs; those that TRL has too keep their names.
    loss_type: TRL's name of the loss.
    settings: other fields of TRL's config.

  Returns:
    (loss, gradient with respect to `logps` [N, 2]).
  """
  import torch
  from trl.trainer.dpo_trainer import DPOTrainer

  def rows(name):  # TRL's batch is all chosen, then all rejected
    return torch.tensor(fields[name].T.reshape(-1))

  lengths = rows("num_tokens")
  width = int(lengths.max())
  mask = (torch.arange(width) < lengths[:, None]).double()
  per_token = (rows("logps") / lengths)[:, None] * mask
  per_token = per_token.requires_grad_()
  # TRL subtracts the log of the sum of squared probabilities of each token.
  normalizer = ((rows("logps") / lengths) - rows("alignment"))[:, None]
  outputs = SimpleNamespace(
    log_probs=per_token,
    log_sum_sq_probs=normalizer.expand(per_token.shape),
    entropy=mask,
    mean_logits=mask,
    is_top1=mask.bool(),
  )
  names = ("beta", "label_smoothing", "tau")
  shared = {k: v for k, v in knobs.items() if k in names}
  prompt = torch.zeros(len(lengths), 1)
  # The head's share of the reference is not read from tokens there.
  reference = fields["ref_logps"]
  if settings.get("ld_alpha") is not None:
    head = fields["ref_head_logps"]
    reference = head + settings["ld_alpha"] * (reference - head)
  chosen, rejected = torch.tensor(reference.T)
  loss = DPOTrainer._compute_loss(
    _dpo_trainer(loss_type, {**shared, **settings}),
    lambda **_: outputs,
    {
      "input_ids": torch.zeros(len(lengths), width + 1, dtype=torch.long),
      "attention_mask": torch.ones(len(lengths), width + 1),
      "completion_mask": torch.cat([prompt, mask], 1).long(),
      "ref_chosen_logps": chosen,
      "ref_rejected_logps": rejected,
    },
    return_outputs=False,
  )
  loss.backward()
  # Every loss here sees a sum of tokens: all have the gradient of the first.
  gradient = per_token.grad[:, 0].numpy().reshape(2, -1).T
  return loss.item(), gradient


def _trl_cpo(
  fields: dict[str, np.ndarray], knobs: dict[str, Any], alpha: float
) -> tuple[np.ndarray, np.ndarray]:
  """Computes SimPO's losses and their gradients with TRL's CPO trainer."""
  import torch
  from trl.experimental.cpo.cpo_trainer import CPOTrainer

  logps = torch.tensor(fields["logps"], requires_grad=True)
  means = logps / torch.tensor(fields["num_tokens"])
  trainer = SimpleNamespace(
    accelerator=SimpleNamespace(device="cpu"),
    alpha=alpha,
    beta=knobs["beta"],
    label_smoothing=0.0,
    loss_type="simpo",
    simpo_gamma=knobs["gamma_over_beta"] * knobs["beta"],
  )
  losses = CPOTrainer.cpo_loss(trainer, means[:, 0], means[:, 1])[0]
  losses.sum().backward()
  return losses.detach().numpy(), logps.grad.numpy()


def make_losses() -> dict[str, Any]:
  """Computes losses.json."""
  fields = draw_fields()
  cases = []
  for name, knobs, loss_type, settings in _DPO_CASES:
    if name in _COUPLED:
      loss, gradient = _trl_dpo(fields, knobs, loss_type, dict(settings))
      losses, gradient = [loss] * _NUM_PAIRS, gradient * _NUM_PAIRS
    else:
      batches = [
        {k: v[i : i + 1] for k, v in fields.items()} for i in range(_NUM_PAIRS)
      ]
      pairs = [_trl_dpo(b, knobs, loss_type, dict(settings)) for b in batches]
      losses = [loss for loss, _ in pairs]
      gradient = np.concatenate([gradient for _, gradient in pairs])
    cases.append((name, knobs, losses, gradient))
  for name, knobs, alpha in _CPO_CASES:
    cases.append((name, knobs, *_trl_cpo(fields, knobs, alpha)))
  return {
    "fields": {k: v.tolist() for k, v in fields.items()},
    "cases": [
      {
        "name": name,
        "knobs": knobs,
        "losses": np.asarray(losses).tolist(),
        # ld_dpo divides its tokens in two, whose gradients differ.
        "gradient": None if name == "ld_dpo" else gradient.tolist(),
      }
      for name, knobs, losses, gradient in cases
    ],
  }


def draw_weights(
  family: str, shapes: dict[str, list[int]]
) -> dict[str, np.ndarray]:
  """Draws the weights of a model: f32, by name of tensor.

  Args:
    family: key of `tests.models.families.CASES`.
    shapes: shape of each tensor.
  """

  def draw(name, shape):
    rng = np.random.default_rng(zlib.crc32(f"{family} {name}".encode()))
    start = 1.0 if len(shape) == 1 and name.endswith("weight") else 0.0
    noise = 0.3 if len(shape) == 1 else 0.25
    return (start + noise * rng.standard_normal(shape)).astype(np.float32)

  return {name: draw(name, shape) for name, shape in shapes.items()}


def draw_tokens(family: str) -> np.ndarray:
  """Draws the token ids of a sequence, i32 [12]."""
  rng = np.random.default_rng(zlib.crc32(family.encode()))
  return rng.integers(3, 96, 12).astype(np.int32)


def make_families() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """Computes families.json and the arrays of families.npz."""
  from safetensors.numpy import load_file, save_file
  import torch
  import transformers

  from tests.models.families import CASES, make_model

  described, logits = {}, {}
  for family in CASES:
    with tempfile.TemporaryDirectory() as folder:
      make_model(family).save_pretrained(folder)
      path = pathlib.Path(folder, "model.safetensors")
      shapes = {k: list(v.shape) for k, v in load_file(path).items()}
      save_file(draw_weights(family, shapes), path, metadata={"format": "pt"})
      model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
      ).eval()
      config = json.loads(pathlib.Path(folder, "config.json").read_text())
    with torch.no_grad():
      tokens = torch.tensor(draw_tokens(family)[None])
      logits[family] = model(tokens).logits[0].numpy()
    described[family] = {"config": config, "shapes": shapes}
  return described, logits


def _write_json(name: str, content: Any) -> None:
  (FOLDER / name).write_text(json.dumps(content, sort_keys=True) + "\n")


def main() -> None:
  _write_json("losses.json", make_losses())
  described, logits = make_families()
  _write_json("families.json", described)
  np.savez_compressed(FOLDER / "families.npz", **logits)


if __name__ == "__main__":
  main()
