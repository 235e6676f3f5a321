"""A text classifier: logistic regression on a bag of n-grams, in one file.

It gives a sentiment experiment its gold rewards and labels. Training on
labelled texts takes seconds, without a download.
"""

from collections.abc import Sequence
import itertools
import re
import zlib

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpo_jax.system.files import read_arrays, write_arrays
from dpo_jax.system.inputs import is_there

_WORD = re.compile(r"[a-z']+|[!?]")


class Classifier:
  """Logistic regression on the words and pairs of words of a text.

  A text is the set of its n-grams, hashed into buckets. Each weighs
  1 / sqrt(number of n-grams), so a long text does not count for more.
  """

  def __init__(self, weights: np.ndarray, bias: float):
    """Takes weights, as `fit_classifier` finds them.

    Args:
      weights: f32 [num_buckets].
      bias: bias of the logit.
    """
    self.weights, self.bias = weights, float(bias)

  def logits(self, texts: Sequence[str]) -> np.ndarray:
    """Computes log p / (1 - p) of the positive class: f64 [n]."""
    out = np.empty(len(texts))
    for i, text in enumerate(texts):
      buckets = text_buckets(text, len(self.weights))
      total = self.weights[buckets].sum(dtype=np.float64)
      out[i] = self.bias + total / np.sqrt(max(len(buckets), 1))
    return out

  def write(self, path: str) -> None:
    arrays = {"weights": self.weights, "bias": np.float64(self.bias)}
    write_arrays(path, arrays)

  @classmethod
  def read(cls, path: str) -> "Classifier":
    """Reads the file of a classifier.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is damaged, or does not hold a classifier.
    """
    if not is_there(path):
      raise FileNotFoundError(f"classifier:{path}: no such file")
    try:
      arrays = read_arrays(epath.Path(path))
      weights, bias = arrays["weights"], float(arrays["bias"])
    except (ValueError, TypeError, KeyError) as error:
      raise ValueError(
        f"classifier:{path} is damaged, or not a classifier: {error!r}"
      ) from error
    if weights.ndim != 1 or not np.isfinite(weights).all():
      raise ValueError(f"classifier:{path} holds weights that are not finite")
    return cls(weights, bias)


def text_buckets(text: str, num_buckets: int) -> np.ndarray:
  """Returns the buckets of a text's words and pairs of words: i64 [n]."""
  words = _WORD.findall(text.lower())
  grams = {
    *words,
    *(f"{a} {b}" for a, b in itertools.pairwise(words)),
  }
  # Python's hash differs from process to process.
  found = {zlib.crc32(gram.encode()) % num_buckets for gram in grams}
  return np.array(sorted(found), np.int64)


def fit_classifier(
  texts: Sequence[str],
  labels: Sequence[bool],
  *,
  num_buckets: int = 2**17,
  num_steps: int = 300,
  penalty: float = 1e-4,
) -> Classifier:
  """Fits a `Classifier`: logistic loss and a ridge, by Adam on all texts.

  Args:
    texts: texts to learn from.
    labels: whether each is positive.
    num_buckets: buckets of the hashed n-grams.
    num_steps: full-batch steps.
    penalty: factor of half the sum of the squared weights.

  Returns:
    The classifier.

  Raises:
    ValueError: no texts, one class only, or not a label for each text.
  """
  targets = np.asarray(labels, np.float32)
  if len(texts) != len(targets) or len(set(targets.tolist())) != 2:
    raise ValueError(
      f"a classifier learns from texts of two classes, and was given"
      f" {len(texts)} texts with {len(targets)} labels:"
      f" {sorted(set(targets.tolist()))}"
    )
  found = [text_buckets(text, num_buckets) for text in texts]
  rows = jnp.asarray(np.repeat(np.arange(len(found)), list(map(len, found))))
  columns = jnp.asarray(np.concatenate(found))
  sizes = np.array([max(len(f), 1) for f in found])
  scale = jnp.asarray(1.0 / np.sqrt(sizes), jnp.float32)
  targets = jnp.asarray(targets)

  def loss_fn(params):
    sums = jax.ops.segment_sum(params["weights"][columns], rows, len(found))
    logits = params["bias"] + scale * sums
    losses = optax.sigmoid_binary_cross_entropy(logits, targets)
    return losses.mean() + penalty * jnp.square(params["weights"]).sum() / 2

  optimizer = optax.adam(optax.cosine_decay_schedule(0.1, num_steps))

  @jax.jit
  def step(carry, _):
    params, state = carry
    updates, state = optimizer.update(jax.grad(loss_fn)(params), state)
    return (optax.apply_updates(params, updates), state), None

  params = {"weights": jnp.zeros(num_buckets), "bias": jnp.zeros(())}
  (params, _), _ = jax.lax.scan(
    step, (params, optimizer.init(params)), None, length=num_steps
  )
  return Classifier(np.asarray(params["weights"]), float(params["bias"]))
