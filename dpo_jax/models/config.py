"""What a decoder looks like, and presets by name."""

import dataclasses
from typing import Any

REMAT_POLICIES = ("none", "full", "dots")
ATTENTION_BACKENDS = ("auto", "xla", "splash", "cudnn", "dense")
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Shape of a Llama-family decoder.

  Attributes:
    vocab_size: V, rows of the embedding.
    d_model: D, width of the residual stream.
    num_layers: L.
    num_heads: H, query heads.
    num_kv_heads: key and value heads; divides num_heads.
    head_dim: width of a head.
    d_ff: width of the gated feed-forward layer.
    max_positions: longest prompt + response that the model was made for.
    rope_theta: base of the rotary embedding.
    norm_eps: added to the variance in RMSNorm.
    tie_embeddings: whether the output projection is the embedding.
    value_head: whether a scalar is read off the hidden states.
    param_dtype: dtype of the parameters that are trained.
    compute_dtype: dtype of matmuls and activations; norms, softmax and
      log-probs are float32 whatever it is.
    remat: what the backward pass recomputes in a layer: "none", "full"
      (everything), or "dots" (everything but matmuls).
    attention: one of ATTENTION_BACKENDS, see `attention.make_rows`.
  """

  vocab_size: int
  d_model: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  d_ff: int
  max_positions: int
  rope_theta: float = 10_000.0
  norm_eps: float = 1e-5
  tie_embeddings: bool = True
  value_head: bool = False
  param_dtype: str = "float32"
  compute_dtype: str = "float32"
  remat: str = "none"
  attention: str = "auto"

  def __post_init__(self):
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f"num_heads={self.num_heads} must be a multiple of"
        f" num_kv_heads={self.num_kv_heads}"
      )
    if self.head_dim % 2:
      raise ValueError(
        f"head_dim={self.head_dim} must be even: rotary embeddings turn pairs"
        " of channels"
      )
    if self.remat not in REMAT_POLICIES:
      raise ValueError(
        f"remat={self.remat!r} is unknown. Known: {', '.join(REMAT_POLICIES)}"
      )
    if self.attention not in ATTENTION_BACKENDS:
      raise ValueError(
        f"policy.attention={self.attention!r} is unknown. Known:"
        f" {', '.join(ATTENTION_BACKENDS)}"
      )
    for field in ("param_dtype", "compute_dtype"):
      if getattr(self, field) not in DTYPES:
        raise ValueError(
          f"{field}={getattr(self, field)!r} is unknown. Known:"
          f" {', '.join(DTYPES)}"
        )

  def num_params(self) -> int:
    """Parameters, counted from the shapes."""
    attention = self.d_model * self.head_dim * 2
    attention *= self.num_heads + self.num_kv_heads
    layer = attention + 3 * self.d_model * self.d_ff + 2 * self.d_model
    embeddings = self.vocab_size * self.d_model
    if not self.tie_embeddings:
      embeddings *= 2
    value_head = self.d_model if self.value_head else 0
    return embeddings + self.num_layers * layer + self.d_model + value_head


# Shapes for models trained from scratch; the vocabulary comes from the
# tokenizer. A checkpoint brings its own shape.
PRESETS: dict[str, dict[str, Any]] = {
  "tiny": dict(
    d_model=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    d_ff=160,
    max_positions=512,
  ),
  "1m": dict(
    d_model=128,
    num_layers=5,
    num_heads=4,
    num_kv_heads=4,
    head_dim=32,
    d_ff=352,
    max_positions=512,
  ),
}
