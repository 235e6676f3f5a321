"""Muon: momentum whose update of a matrix is orthogonalized.

Jordan et al. 2024 (kellerjordan.github.io/posts/muon), with the scale of Liu et
al. 2025 (arXiv:2502.16982), eq. 4.
"""

import math
import re
from typing import Any

import jax
import optax
from optax import contrib

from dpo_jax.trees import path_name

# The momentum and the root mean square of an update, both of Liu et al.
_MOMENTUM = 0.95
_UPDATE_RMS = 0.2
# Kernels and adapters of a layer. Layers are stacked on the first axis.
_MATRIX = re.compile(r"^layers/(\w+)/(kernel|lora_a|lora_b)$")


def label_params(params: Any) -> Any:
  """Returns 'muon' for every matrix of a layer, 'adamw' for other leaves.

  Embeddings, the head, the value head, biases and norm scales are the others.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, _: "muon" if _MATRIX.match(path_name(path)) else "adamw",
    params,
  )


def scale_by_muon() -> optax.GradientTransformation:
  """Replaces gradients of matrices by updates of root mean square 0.2.

  That is about AdamW's, so its learning rate and weight decay can be kept. A
  matrix of a layer maps all its input axes to all its output axes; each of two
  adapter factors is a matrix of its own. Five Newton-Schulz steps give singular
  values of about 1, between 0.7 and 1.2.

  Each leaf must be one that `label_params` calls 'muon'. Updates keep the sign
  of the gradients. Unlike the sources, optax corrects the momentum for its
  start at zero.
  """
  return optax.chain(
    contrib.scale_by_muon(
      beta=_MOMENTUM, nesterov=True, weight_dimension_numbers=_matrix_axes
    ),
    optax.stateless(lambda updates, params=None: _scale(updates)),
  )


def _matrix_axes(params: Any) -> Any:
  """Returns the input and output axes of every matrix, for optax's Muon."""

  def axes(path, leaf):
    projection, name = _MATRIX.match(path_name(path)).groups()
    joins_heads = projection == "attention_out" and name != "lora_b"
    first_output = 3 if joins_heads else 2
    return contrib.MuonDimensionNumbers(
      tuple(range(1, first_output)), tuple(range(first_output, leaf.ndim))
    )

  return jax.tree_util.tree_map_with_path(axes, params)


def _scale(updates: Any) -> Any:
  """Multiplies each matrix by 0.2 sqrt(max(inputs, outputs))."""

  def scale(update, axes):
    largest = max(math.prod(update.shape[i] for i in each) for each in axes)
    return _UPDATE_RMS * math.sqrt(largest) * update

  return jax.tree.map(scale, updates, _matrix_axes(updates))
