"""Imports point one way: a module imports only what stands above it."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1] / "dpo_jax"

# From the top of the house to its door. Modules of one line know nothing of
# each other's rank within a folder but what `_FOLDERS` says.
ORDER = [
  "compat",
  "types",
  "files",
  "workdir",
  "cache",
  "progress",
  "losses",
  "config",
  "command_line",
  "models",
  "distributed",
  "mesh",
  "data",
  "optimizer",
  "checkpoint",
  "scoring",
  "reference",
  "step",
  "program",
  "model_source",
  "classifier",
  "judges",
  "evaluate",
  "online",
  "metrics",
  "profile",
  "run",
  "header",
  "console",
  "start",
  "train",
  "export",
  "topology",
  "hlo",
  "roofline",
  "ahead_of_time",
  "plan",
]
_FOLDERS = {
  "losses": [
    "numerics",
    "policy_gradient",
    "rewards",
    "knobs",
    "links",
    "regularizers",
    "preference",
    "catalogue",
    "objective",
  ],
  "config": ["values", "keys", "record", "resolve"],
  "models": [
    "config",
    "presets",
    "lora",
    "rotary",
    "partition",
    "blocked",
    "splash",
    "attention",
    "decoder",
    "vocabulary",
    "logps",
    "generate",
    "unread_keys",
    "families",
    "tensor_map",
    "hf",
    "peft",
  ],
  "data": [
    "messages",
    "spellings",
    "formats",
    "reading",
    "dialogues",
    "prompts",
    "examples",
    "synthetic",
    "tfds_builders",
    "hub",
    "sources",
    "templates",
    "tokenizer_json",
    "alphabets",
    "tokenizers",
    "tokenizer_files",
    "repeats",
    "groups",
    "store",
    "mismatched",
    "packing",
    "mixture",
    "loader",
    "checks",
    "pipeline",
  ],
}


def modules():
  return sorted(
    path.relative_to(ROOT).with_suffix("").parts
    for path in ROOT.rglob("*.py")
    if path.name != "__init__.py"
  )


def imports(parts):
  """Names below dpo_jax that a module imports, anywhere in it."""
  tree = ast.parse((ROOT.joinpath(*parts).with_suffix(".py")).read_text())
  found = []
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
      "dpo_jax"
    ):
      base = node.module.split(".")[1:]
      for alias in node.names:
        path = (*base, alias.name)
        is_module = ROOT.joinpath(*path).with_suffix(".py").exists()
        is_folder = ROOT.joinpath(*path).is_dir()
        found.append(path if is_module or is_folder else tuple(base))
    elif isinstance(node, ast.Import):
      found += [
        tuple(alias.name.split(".")[1:])
        for alias in node.names
        if alias.name.startswith("dpo_jax")
      ]
  return found


def test_every_module_has_its_place():
  for parts in modules():
    assert parts[0] in ORDER, f"{parts} is not in the house"
    if len(parts) > 1:
      assert parts[1] in _FOLDERS[parts[0]], f"{parts} is not in its folder"


@pytest.mark.parametrize("parts", modules(), ids="/".join)
def test_imports_point_one_way(parts):
  for target in imports(parts):
    if not target:
      continue
    if target[0] == parts[0] and len(parts) > 1:
      order = _FOLDERS[parts[0]]
      assert len(target) > 1, f"{parts} imports its own folder"
      assert order.index(target[1]) < order.index(parts[1]), (parts, target)
    else:
      assert ORDER.index(target[0]) < ORDER.index(parts[0]), (parts, target)


def test_only_compat_reads_private_names_of_libraries():
  for path in ROOT.rglob("*.py"):
    if path.name == "compat.py":
      continue
    tree = ast.parse(path.read_text())
    modules = {
      alias.asname or alias.name.split(".")[0]
      for node in ast.walk(tree)
      if isinstance(node, ast.Import | ast.ImportFrom)
      for alias in node.names
    }
    for node in ast.walk(tree):
      is_private = isinstance(node, ast.Attribute) and node.attr[:1] == "_"
      if is_private and not node.attr.startswith("__"):
        name = getattr(node.value, "id", "")
        assert name not in modules, f"{path.name}:{node.lineno} {node.attr}"


def test_losses_import_only_jax_and_types():
  allowed = {"jax", "chex", "dpo_jax", "collections", "dataclasses"}
  allowed |= {"difflib", "inspect", "typing", "functools", "operator", "math"}
  allowed |= {"numpy"}
  for path in (ROOT / "losses").glob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom):
        names = [node.module]
      else:
        continue
      for name in names:
        assert name.split(".")[0] in allowed, f"{path.name} imports {name}"
        if name.startswith("dpo_jax"):
          assert name.startswith(("dpo_jax.losses", "dpo_jax.types"))


def test_no_branch_on_a_loss_name_outside_losses():
  from dpo_jax.losses import CATALOGUE

  for path in ROOT.rglob("*.py"):
    if "losses" in path.parts:
      continue
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Compare):
        for side in (node.left, *node.comparators):
          is_name = isinstance(side, ast.Constant) and side.value in CATALOGUE
          assert not is_name, f"{path.name}:{node.lineno}"
