"""Imports point one way: a module imports only what stands above it."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1] / "dpo_jax"

# The rooms of the house, from the top to the door: a room imports only those
# above it. Within a room the order of its modules holds too.
ROOMS: dict[str, list[str]] = {
  "names": [],
  "intervals": [],
  "trees": [],
  "system": [
    "signals",
    "chips",
    "compat",
    "version",
    "downloads",
    "inputs",
    "files",
    "cache",
    "progress",
  ],
  "types": [],
  "losses": [
    "numerics",
    "policy_gradient",
    "rewards",
    "knobs",
    "links/running",
    "links/base",
    "links/margins",
    "links/pairs",
    "links/unpaired",
    "links/rankings",
    "links/samples",
    "links",
    "regularizers",
    "groups",
    "catalogue/row",
    "catalogue/margins",
    "catalogue/pairs",
    "catalogue/unpaired",
    "catalogue/rankings",
    "catalogue/samples",
    "catalogue",
    "objective",
    "build",
    "arrays",
    "functions",
  ],
  "config": ["values", "keys", "online", "resolve"],
  "command_line": [],
  "parallel": [
    "active_mesh",
    "watcher",
    "peers",
    "hosts",
    "stop_signal",
    "mesh",
    "sharding",
    "placement",
    "pmap",
  ],
  "models": [
    "config",
    "presets",
    "lora",
    "trainable",
    "rotary",
    "partition_rules",
    "attention/masks",
    "attention/dense",
    "attention/blockwise",
    "attention/visits",
    "attention/splash",
    "attention/triton_tiles",
    "attention/triton_kernels",
    "attention/triton",
    "attention/rows",
    "attention",
    "layers",
    "decoder",
    "vocabulary_blocks",
    "online_softmax",
    "logps",
    "generate",
    "huggingface/unread_keys",
    "huggingface/families",
    "huggingface/ranges",
    "huggingface/config_json",
    "huggingface/tensor_map",
    "huggingface/read",
    "huggingface/write",
    "huggingface/peft",
    "huggingface",
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
    "template_child",
    "templates",
    "tokenizer_json",
    "alphabets",
    "tokenizers",
    "tokenizer_files",
    "repeats",
    "encoding",
    "groups",
    "checksums",
    "chain",
    "store_files",
    "store",
    "addresses",
    "mismatched",
    "packing",
    "mixture",
    "batch_plan",
    "loader",
    "scoring",
    "checks",
    "sets",
    "pipeline",
  ],
  "records": [
    "workdir",
    "lock",
    "commits",
    "history",
    "resume",
    "sinks",
    "tracker_child",
    "tracker",
    "lines",
    "metrics",
    "manifest",
    "recovery",
    "arrays",
    "checkpoint",
    "eval_logps",
    "profile",
  ],
  "model_sources": [
    "base",
    "random_weights",
    "huggingface_model",
    "moved",
    "parse",
    "model_card",
    "push",
    "export",
  ],
  "judges": [
    "base",
    "table",
    "classifier",
    "reward_model",
    "orders",
    "answers",
    "chat_server",
    "api",
    "get_judge",
  ],
  "training": [
    "muon",
    "optimizer",
    "reference",
    "logps_cache",
    "logps_parts",
    "forward",
    "gradients",
    "spikes",
    "step",
    "measure",
    "program",
    "samples",
    "evaluation",
    "start",
    "setup",
    "opening",
    "stops",
    "nonfinite",
    "initial_state",
    "known_reference",
    "cached_reference",
    "evaluator",
    "header",
    "console",
  ],
  "evaluating": ["settings", "opening", "results", "evaluation"],
  "online": ["snapshot", "rollouts", "mixing", "loader", "open_loaders"],
  "planning": [
    "topology",
    "hlo",
    "roofline",
    "compilation",
    "tables",
    "remedies",
    "report",
    "sweep",
  ],
  "viewing": [
    "terminal",
    "rows",
    "groups",
    "preflight",
    "open_policy",
    "answers",
    "runs",
  ],
  "train": [],
  "evaluate": [],
  "export": [],
  "plan": [],
  "inspect": [],
  "generate": [],
  "compare": [],
}
_ORDER = list(ROOMS)


def modules():
  """Parts of the path of each module; a folder with exports is one too."""
  found = []
  for path in ROOT.rglob("*.py"):
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[-1] != "__init__":
      found.append(parts)
    elif len(parts) > 2 and "import" in path.read_text():
      found.append(parts[:-1])
  return sorted(found)


def file_of(parts):
  path = ROOT.joinpath(*parts)
  return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imports(parts):
  """Names below dpo_jax that a module imports, anywhere in it."""
  tree = ast.parse(file_of(parts).read_text())
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
  return [path for path in found if path]


def rank(parts):
  """Order of a module within its room."""
  return ROOMS[parts[0]].index("/".join(parts[1:]))


def test_every_module_has_its_room():
  for parts in modules():
    assert parts[0] in ROOMS, f"{parts} is not in the house"
    name = "/".join(parts[1:])
    assert not name or name in ROOMS[parts[0]], f"{parts} is not in its room"


def test_every_room_has_its_modules():
  listed = {
    (room, *name.split("/")) if name else (room,)
    for room, names in ROOMS.items()
    for name in names or [""]
  }
  assert listed == set(modules())


@pytest.mark.parametrize("parts", modules(), ids="/".join)
def test_imports_point_one_way(parts):
  for target in imports(parts):
    if target[0] != parts[0]:
      assert _ORDER.index(target[0]) < _ORDER.index(parts[0]), (parts, target)
    elif len(parts) > 1:
      assert len(target) > 1, f"{parts} imports its own room"
      assert rank(target) < rank(parts), (parts, target)


SOURCES = [
  path
  for folder in ("dpo_jax", "configs", "experiments", "benchmarks", "scripts")
  for path in sorted((ROOT.parent / folder).rglob("*.py"))
]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_modules_and_functions_are_short_or_say_why_not(path):
  """400 lines and, without its docstring, 60; a longer one gives a reason."""
  text = path.read_text()
  lines, tree = text.split("\n"), ast.parse(text)
  if len(lines) > 401:
    assert "400" in (ast.get_docstring(tree) or ""), f"{path}: {len(lines)}"
  for node in ast.walk(tree):
    if isinstance(node, ast.FunctionDef):
      length = node.end_lineno - node.lineno + 1
      if ast.get_docstring(node):
        length -= node.body[0].end_lineno - node.body[0].lineno + 1
      if length > 60:
        assert "Over 60 lines" in lines[node.lineno - 2], (path, node.name)


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
      # Python documents `os._exit`.
      if is_private and node.attr != "_exit" and not node.attr.startswith("__"):
        name = getattr(node.value, "id", "")
        assert name not in modules, f"{path.name}:{node.lineno} {node.attr}"


def test_losses_import_only_jax_names_and_types():
  allowed = {"jax", "chex", "dpo_jax", "collections", "dataclasses"}
  allowed |= {"difflib", "inspect", "typing", "functools", "operator", "math"}
  allowed |= {"numpy"}
  for path in (ROOT / "losses").rglob("*.py"):
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
          above = ("dpo_jax.losses", "dpo_jax.types", "dpo_jax.names")
          assert name.startswith(above)


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
