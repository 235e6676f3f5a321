"""ModelConfig: the shape of a decoder, and the options of its computation."""

from collections.abc import Mapping
import dataclasses
import math
import re
from typing import Any

# Names of activations that a layer may save for the backward pass, and the
# names that each value of `remat` saves; "none" saves all activations.
ATTENDED, PROJECTED = "attended", "projected"
REMAT_POLICIES = {
  "none": None,
  "dots": (ATTENDED, PROJECTED),
  "attention": (ATTENDED,),
  "full": (),
}
ATTENTION_BACKENDS = ("auto", "xla", "splash", "triton", "dense")
DTYPES = ("float32", "bfloat16")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
QK_NORMS = ("", "head", "full")
# Projections of a layer, which may have adapters.
PROJECTIONS = (
  "query",
  "key",
  "value",
  "attention_out",
  "gate",
  "up",
  "down",
)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Scaling of rotary frequencies for contexts longer than in training.

  Attributes:
    kind: "linear" divides all frequencies by `factor`; "llama3" divides the
      slow ones and blends between (Llama 3.1's report, sec. 3.4.2).
    factor: above 1.
    low_freq_factor: llama3: frequencies with wavelengths above
      original_positions / low_freq_factor are divided.
    high_freq_factor: llama3: frequencies with wavelengths below
      original_positions / high_freq_factor are unchanged.
    original_positions: llama3: context length of pre-training.
  """

  kind: str
  factor: float
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_positions: int = 8192

  def __post_init__(self):
    if self.kind not in ("linear", "llama3"):
      raise ValueError(
        f"rope scaling {self.kind!r} is unknown. Known: linear, llama3"
      )


@dataclasses.dataclass(frozen=True)
class Lora:
  """Low-rank adapters: W + scale A B (Hu et al. 2021, arXiv:2106.09685).

  Attributes:
    rank: columns of A and rows of B.
    alpha: scale is alpha / rank, or alpha / sqrt(rank).
    targets: regular expression; projections whose whole name it matches get an
      adapter.
    is_rank_stabilized: divide by the root of the rank, so that alpha need not
      be tuned for each rank (Kalajdzievski 2023, rsLoRA, arXiv:2312.03732).
  """

  rank: int
  alpha: float
  targets: str = ".*"
  is_rank_stabilized: bool = False

  def __post_init__(self):
    if self.rank < 1 or not self.alpha > 0:
      raise ValueError(
        f"lora.rank={self.rank} must be at least 1 and lora.alpha={self.alpha}"
        " above 0"
      )
    try:
      pattern = re.compile(self.targets)
    except re.error as error:
      raise ValueError(
        f"lora.targets={self.targets!r} is not a regular expression: {error}"
      ) from error
    if not any(pattern.fullmatch(name) for name in PROJECTIONS):
      raise ValueError(
        f"lora.targets={self.targets!r} matches none of"
        f" {', '.join(PROJECTIONS)}"
      )

  @property
  def scale(self) -> float:
    root = math.sqrt(self.rank) if self.is_rank_stabilized else self.rank
    return self.alpha / root

  def has(self, projection: str) -> bool:
    """Returns whether a projection has an adapter."""
    return re.fullmatch(self.targets, projection) is not None


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Shape of a decoder. The defaults are Llama's.

  Attributes:
    vocab_size: V, rows of the embedding.
    d_model: D, width of the residual stream.
    num_layers: L.
    num_heads: H, query heads.
    num_kv_heads: key and value heads; divides num_heads.
    head_dim: width of a head.
    d_ff: width of the feed-forward layer.
    max_positions: maximum length of prompt + response.
    family: name in huggingface/families.py; an export has its format.
    norm: "rms", or "layer" with mean and bias.
    norm_eps: added to the variance.
    norm_offset: added to a norm's scale; 1 in Gemma.
    pre_norm: whether the inputs of attention and feed-forward are normed.
    post_norm: whether their outputs are normed.
    is_parallel: whether both have the same input, and their outputs are added.
    is_norm_shared: whether they share one norm, if parallel.
    activation: activation of the feed-forward network, one of ACTIVATIONS.
    is_gated: whether the feed-forward network has a gate.
    qkv_bias: whether query, key and value have a bias.
    out_bias: whether the attention's output projection has a bias.
    mlp_bias: whether the feed-forward projections have a bias.
    head_bias: whether the projection to logits has a bias.
    qk_norm: norm of queries and keys: "" none, "head" over each head, "full"
      over all heads together.
    attention_scale: factor of the scores; None is head_dim ** -0.5.
    attention_soft_cap: scores become cap * tanh(scores / cap); None: no cap.
    logits_soft_cap: the same for logits.
    has_learned_positions: whether positions are learned, not rotary.
    rotary_dim: channels of a head that are rotated; None is all.
    rope_theta: base of the rotary embedding.
    rope_scaling: see RopeScaling.
    local_rope_theta: base in local layers, without scaling; None is as in the
      others.
    window: positions that a local layer sees, the token's own included.
    local_layers: bool for every layer, whether it is local; () is none.
    is_embedding_scaled: whether embeddings are multiplied by sqrt(D).
    tie_embeddings: whether the output projection is the embedding.
    value_head: whether there is a scalar head on the hidden states.
    param_dtype: dtype of the parameters that are not trained. If nothing is
      frozen, dtype of all parameters, for a model that is not trained.
    compute_dtype: dtype of matmuls and activations. Norms, softmax and
      log-probs are always float32.
    remat: activations that the backward pass recomputes: "none"; "dots", all
      but the outputs of projections and attention (the dense backend
      recomputes scores); "attention", all but those of attention; or "full".
    attention: one of ATTENTION_BACKENDS, see `attention.make_rows`.
    lora: adapters, or None.
    frozen: regular expression; parameters whose path it matches anywhere are
      not trained.
  """

  vocab_size: int
  d_model: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  d_ff: int
  max_positions: int
  family: str = "llama"
  norm: str = "rms"
  norm_eps: float = 1e-5
  norm_offset: float = 0.0
  pre_norm: bool = True
  post_norm: bool = False
  is_parallel: bool = False
  is_norm_shared: bool = False
  activation: str = "silu"
  is_gated: bool = True
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  head_bias: bool = False
  qk_norm: str = ""
  attention_scale: float | None = None
  attention_soft_cap: float | None = None
  logits_soft_cap: float | None = None
  has_learned_positions: bool = False
  rotary_dim: int | None = None
  rope_theta: float = 10_000.0
  rope_scaling: RopeScaling | None = None
  local_rope_theta: float | None = None
  window: int | None = None
  local_layers: tuple[bool, ...] = ()
  is_embedding_scaled: bool = False
  tie_embeddings: bool = True
  value_head: bool = False
  param_dtype: str = "float32"
  compute_dtype: str = "float32"
  remat: str = "none"
  attention: str = "auto"
  lora: Lora | None = None
  frozen: str = ""

  def __post_init__(self):
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f"num_heads={self.num_heads} must be a multiple of"
        f" num_kv_heads={self.num_kv_heads}"
      )
    rotary_dim = self.head_dim if self.rotary_dim is None else self.rotary_dim
    if rotary_dim % 2 or not 0 < rotary_dim <= self.head_dim:
      raise ValueError(
        f"rotary_dim={rotary_dim} must be even and at most"
        f" head_dim={self.head_dim}: rotary embeddings rotate pairs of channels"
      )
    for field, known in (
      ("remat", REMAT_POLICIES),
      ("attention", ATTENTION_BACKENDS),
      ("param_dtype", DTYPES),
      ("compute_dtype", DTYPES),
      ("activation", ACTIVATIONS),
      ("qk_norm", QK_NORMS),
      ("norm", ("rms", "layer")),
    ):
      if getattr(self, field) not in known:
        raise ValueError(
          f"{field}={getattr(self, field)!r} is unknown. Known:"
          f" {', '.join(map(repr, known))}"
        )
    if self.local_layers and (
      self.window is None or len(self.local_layers) != self.num_layers
    ):
      raise ValueError(
        f"local_layers has {len(self.local_layers)} entries for"
        f" {self.num_layers} layers and window={self.window}"
      )

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any]) -> "ModelConfig":
    """Makes a config from its `dataclasses.asdict`, also if read from JSON.

    Raises:
      TypeError: unknown fields, or needed ones that are missing.
      ValueError: values that do not fit.
    """
    fields = dict(fields)
    for name, kind in (("rope_scaling", RopeScaling), ("lora", Lora)):
      if isinstance(fields.get(name), Mapping):
        fields[name] = kind(**fields[name])
    fields["local_layers"] = tuple(fields.get("local_layers", ()))
    return cls(**fields)

  @property
  def scale(self) -> float:
    """Factor of attention scores."""
    return self.attention_scale or self.head_dim**-0.5

  def projection_shapes(
    self,
  ) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Returns name -> (input axes, output axes) of a layer's projections."""
    heads = (self.num_heads, self.head_dim)
    kv_heads = (self.num_kv_heads, self.head_dim)
    shapes = {
      "query": ((self.d_model,), heads),
      "key": ((self.d_model,), kv_heads),
      "value": ((self.d_model,), kv_heads),
      "attention_out": (heads, (self.d_model,)),
      "gate": ((self.d_model,), (self.d_ff,)),
      "up": ((self.d_model,), (self.d_ff,)),
      "down": ((self.d_ff,), (self.d_model,)),
    }
    if not self.is_gated:
      del shapes["gate"]
    return shapes

  def has_bias(self, projection: str) -> bool:
    """Returns whether a layer's projection has a bias."""
    if projection in ("query", "key", "value"):
      return self.qkv_bias
    return self.out_bias if projection == "attention_out" else self.mlp_bias

  def layer_norms(self) -> tuple[str, ...]:
    """Returns the names of a layer's norms over the model width D."""
    names = []
    if self.pre_norm:
      names += ["attention_norm"]
      names += [] if self.is_norm_shared else ["mlp_norm"]
    if self.post_norm:
      names += ["attention_post_norm", "mlp_post_norm"]
    return tuple(names)

  def num_params(self) -> int:
    """Counts the parameters without adapters, from their shapes."""
    norm = self.d_model * (2 if self.norm == "layer" else 1)
    layer = norm * len(self.layer_norms())
    for name, (inputs, outputs) in self.projection_shapes().items():
      layer += math.prod(inputs) * math.prod(outputs)
      layer += math.prod(outputs) if self.has_bias(name) else 0
    if self.qk_norm == "head":
      layer += 2 * self.head_dim
    elif self.qk_norm == "full":
      layer += (self.num_heads + self.num_kv_heads) * self.head_dim
    total = self.vocab_size * self.d_model * (1 if self.tie_embeddings else 2)
    total += self.vocab_size if self.head_bias else 0
    if self.has_learned_positions:
      total += self.max_positions * self.d_model
    total += self.d_model if self.value_head else 0
    return total + self.num_layers * layer + norm
