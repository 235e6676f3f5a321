"""Changes of a config that would make room on a device."""

import math
from typing import Any

import jax

from dpo_jax.parallel import active_mesh
from dpo_jax.planning.compilation import Plan
from dpo_jax.planning.tables import GIB, readable

# Share of the activations that each stronger remat policy frees, measured for
# llama3-8b on v5e-16 with a row of 2,048 tokens a device. "none" keeps more
# than "dots" does.
_FREED_BY_REMAT = {
  "none": (("attention", 0.65), ("full", 0.75)),
  "dots": (("attention", 0.65), ("full", 0.75)),
  "attention": (("full", 0.25),),
  "full": (),
}


def remedies(plan: Plan) -> list[dict[str, Any]]:
  """Lists changes of the config that free memory on a device.

  Returns:
    A row for each change: "what to change", such as mesh.data=1, and "frees
    about, GiB", a number or `hlo.UNREADABLE`. Changes that free nothing are
    left out.
  """
  program, memory = plan.subject.program, plan.memory
  config, model = plan.subject.config, program.policy.config
  sizes = program.placement.mesh.shape
  rest = plan.peak - sum(memory.values())
  state = memory["parameters"] + memory["optimizer state"]
  found: list[tuple[str, float]] = []
  for policy, share in _FREED_BY_REMAT[model.remat]:
    found.append((f"policy.remat={policy}", share * rest))
  if model.compute_dtype != "bfloat16":
    found.append(("policy.compute_dtype=bfloat16", 0.5 * rest))
  if sizes["data"] > 1:
    fsdp = sizes["data"] * sizes["fsdp"]
    freed = (state + memory["gradients"]) * (1 - 1 / sizes["data"])
    found.append((f"mesh.data=1 mesh.fsdp={fsdp}", freed))
  if memory["reference"]:
    found.append(("reference.kind=cached", memory["reference"]))
  rows = plan.subject.batch.tokens.shape[0]
  rows //= program.placement.num_row_shards
  if rows > config.accumulation_steps:
    parts = config.accumulation_steps * 2
    found.append((f"accumulation_steps={parts}", 0.5 * max(rest, 0.0)))
  trained, frozen = program.split_params(program.policy.abstract_params())
  if frozen is not None and model.param_dtype != "bfloat16":
    share = num_bytes(frozen) / (num_bytes(frozen) + num_bytes(trained))
    freed = 0.5 * share * memory["parameters"]
    found.append(("policy.param_dtype=bfloat16", freed))
  if frozen is None:
    freed = memory["optimizer state"] + memory["gradients"]
    freed += 0.5 * memory["parameters"]
    change = "lora.rank=16 policy.param_dtype=bfloat16 (adapters alone)"
    found.append((change, 0.95 * freed))
  if config.optimizer.name == "adamw":
    freed = 0.5 * memory["optimizer state"]
    found.append(("optimizer.name=rmsprop (or lion)", freed))
  if config.optimizer.name != "adafactor":
    # Its second moments are a row and a column of each matrix.
    freed = 0.98 * memory["optimizer state"]
    found.append(("optimizer.name=adafactor", freed))
  per_row = math.prod(sizes[axis] for axis in active_mesh.ROW_AXES)
  if config.batch_size > per_row:
    found.append((f"batch_size={config.batch_size // 2}", 0.5 * max(rest, 0.0)))
  found.append(("a topology of twice the chips", 0.5 * state))
  return [
    {"what to change": change, "frees about, GiB": readable(freed / GIB)}
    for change, freed in found
    if not freed <= 0
  ]


def num_bytes(tree: Any) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
