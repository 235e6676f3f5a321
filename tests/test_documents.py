"""Commands and code of the documents: what they print can be typed.

A command stands in a block marked bash, sh, console or yaml (a SkyPilot task),
or between backticks in the text. Names in capitals, such as FOLDER, are to be
replaced. Blocks under `<!-- run -->` are run as they are, on tiny inputs.
Lines have at most 100 columns; links, files and keys that documents name exist.
"""

import argparse
import collections
import fnmatch
import functools
import gzip
import importlib
import importlib.util
import json
import os
import pathlib
import re
import runpy
import shlex
import subprocess
import sys
from typing import NamedTuple

from absl import app, flags
import jax
import pytest
import yaml

from benchmarks import results
from dpo_jax import config as config_lib
from dpo_jax.losses import CATALOGUE
from dpo_jax.losses.catalogue import margins as rows
from dpo_jax.losses.links import margins as links
from dpo_jax.models import huggingface
from dpo_jax.names import PEERS
from dpo_jax.planning import compilation, topology
from tests import tiny
from tests.data.folders import write_folder

# Of runpy, about modules that others have imported: each is run for itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules")

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENTS = sorted(
  path.relative_to(ROOT).as_posix()
  for folder in (".", "docs", "experiments", "benchmarks")
  for path in (ROOT / folder).glob("*.md")
)
_SHELLS = ("bash", "sh", "console")
# What stands between commands in a line of a shell.
_OPERATORS = {"&&", "||", "|", ";", "&", "(", ")"}
_FILE = re.compile(r"requirements[\w-]*\.txt|(configs|scripts)/\w+\.py")
_WIDTH = 100
# Makes a training small; a later flag replaces an earlier one.
_TINY = (
  "--config.total_steps=1",
  "--config.batch_size=4",
  "--config.data.max_tokens=64",
  "--config.data.max_prompt_tokens=32",
  "--config.data.max_shapes=1",
  "--config.eval.batch_size=4",
  "--config.eval.max_groups=4",
  "--config.eval.num_samples=0",
)


class Block(NamedTuple):
  """A fenced block.

  Attributes:
    where: document and line.
    language: word of the opening fence.
    is_run: whether `<!-- run -->` stands above.
    text: lines between the fences.
  """

  where: str
  language: str
  is_run: bool
  text: str


def blocks_of(document, text):
  found, lines = [], text.splitlines()
  fences = iter(i for i, line in enumerate(lines) if line.startswith("```"))
  for first, last in zip(fences, fences, strict=True):
    found.append(
      Block(
        f"{document}:{first + 1}",
        lines[first].removeprefix("```").strip(),
        first > 0 and lines[first - 1] == "<!-- run -->",
        "\n".join(lines[first + 1 : last]),
      )
    )
  return found


def spans_of(document, text):
  """Finds what stands between backticks in the text: (where, span)."""
  text = re.sub(
    r"^```.*?^```", lambda m: "\n" * m[0].count("\n"), text, flags=re.M | re.S
  )
  return [
    (f"{document}:{text[: m.start()].count(chr(10)) + 1}", m[1])
    for m in re.finditer(r"`([^`]+)`", text)
  ]


def shell_of(block):
  """Lines of a block that a shell runs."""
  if block.language == "console":
    lines = block.text.replace("\\\n", " ").splitlines()
    return "\n".join(x.removeprefix("$ ") for x in lines if x.startswith("$ "))
  if block.language == "yaml":
    task = yaml.safe_load(block.text)
    return "\n".join(task.get(key, "") for key in ("setup", "run"))
  return block.text if block.language in _SHELLS else ""


def commands_of(text):
  """Splits lines of a shell into commands, each a list of words."""
  commands = []
  for line in text.replace("\\\n", " ").splitlines():
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words = []
    for word in [*lexer, ";"]:
      if word not in _OPERATORS:
        words.append(word)
      elif words:
        commands.append(words)
        words = []
  return commands


class Command(NamedTuple):
  """A command: where it stands, its words, and whether in the text."""

  where: str
  words: list[str]
  is_span: bool


_TEXTS = {name: (ROOT / name).read_text() for name in DOCUMENTS}
_BLOCKS = [b for name, text in _TEXTS.items() for b in blocks_of(name, text)]
_SPANS = [s for name, text in _TEXTS.items() for s in spans_of(name, text)]
_COMMANDS = [
  Command(block.where, words, False)
  for block in _BLOCKS
  for words in commands_of(shell_of(block))
] + [
  Command(where, words, True)
  for where, span in _SPANS
  if re.match(r"(\w+=\S+ )*python\s", span)
  for words in commands_of(" ".join(span.split()))
]


class Parsed(BaseException):
  """A command's own parser has read its flags.

  Attributes:
    values: values of all flags that it defines, by name; None of argparse.
    error: exception of the parser, or None.
  """

  def __init__(self, values, error=None):
    super().__init__()
    self.values, self.error = values, error


def _parse_absl(main):
  """Stands in for `absl.app.run`."""
  try:
    flags.FLAGS(sys.argv)
  except Exception as error:  # of absl, ml_collections or the config's file
    raise Parsed(dict.fromkeys(flags.FLAGS), error) from None
  raise Parsed({name: flags.FLAGS[name].value for name in flags.FLAGS})


def _parse_argparse(parser, argv=None, namespace=None):
  """Stands in for `ArgumentParser.parse_args`."""
  options = [name for a in parser._actions for name in a.option_strings]
  error = None
  try:
    _, unknown = parser.parse_known_args(argv, namespace)
    error = ValueError(f"unknown flags: {unknown}") if unknown else None
  except SystemExit:
    error = ValueError("refused by argparse, which printed why")
  raise Parsed(dict.fromkeys(x.lstrip("-") for x in options), error)


@functools.cache
def parse(module, *arguments):
  """Runs a module as a command, up to and with the parsing of its flags."""
  known, was_parsed = set(flags.FLAGS), flags.FLAGS.is_parsed()
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(ROOT)
    patch.setattr(sys, "argv", [module, *arguments])
    patch.setattr(app, "run", _parse_absl)
    patch.setattr(argparse.ArgumentParser, "parse_args", _parse_argparse)
    patch.setenv("JAX_PLATFORMS", "cpu")  # which some commands set for good
    try:
      runpy.run_module(module, run_name="__main__", alter_sys=True)
    except Parsed as parsed:
      return parsed
    finally:
      for name in set(flags.FLAGS) - known:
        delattr(flags.FLAGS, name)
      if not was_parsed:
        flags.FLAGS.unparse_flags()
  raise AssertionError(f"{module} parses no flags: it is not a command")


@functools.cache
def launcher():
  path = ROOT / "scripts" / "launch_tpu.py"
  spec = importlib.util.spec_from_file_location("launch_tpu", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def is_name(text):
  """Whether it is a name itself: experiments.NAME is to be replaced."""
  return not re.search(r"\b[A-Z]", text)


def module_of(words):
  """Module of this project that a command runs, or ""."""
  at = words.index("python") if "python" in words else len(words)
  module = words[at + 2] if words[at + 1 : at + 2] == ["-m"] else ""
  packages = ("dpo_jax", "experiments", "benchmarks")
  is_ours = module.partition(".")[0] in packages
  return module if is_ours and is_name(module) else ""


def check(words, *, is_span=False):
  """Raises unless a command can be typed.

  Args:
    words: the command; one that is not of this project passes.
    is_span: whether it stands in the text, where a module alone is a name.
  """
  for word in words:
    if _FILE.fullmatch(word):
      assert (ROOT / word).is_file(), f"{word} does not exist"
  if "scripts/launch_tpu.py" in words:
    at = words.index("scripts/launch_tpu.py")
    options = launcher().parse(words[at + 1 :])
    if options.flags:
      check(["python", "-m", "dpo_jax.train", *options.flags])
  module = module_of(words)
  if module:
    assert importlib.util.find_spec(module), f"{module} does not exist"
    arguments = words[words.index(module) + 1 :]
    if arguments or not is_span:
      parsed = parse(module, *arguments)
      if parsed.error:
        raise parsed.error
      if parsed.values.get("config"):
        check_config(parsed.values["config"])


def check_config(config):
  config_lib.resolve(config)


@pytest.mark.parametrize(
  "command", _COMMANDS, ids=lambda c: f"{c.where} {shlex.join(c.words)[:60]}"
)
def test_a_command_has_the_flags_keys_and_files_that_it_names(command):
  check(command.words, is_span=command.is_span)


def test_commands_stand_in_marked_blocks():
  """Unmarked ones would not be checked."""
  unmarked = [
    block.where
    for block in _BLOCKS
    if block.language not in (*_SHELLS, "yaml", "python")
    and re.search(r"^\W*(python|pip|pytest|gcloud|sky) ", block.text, re.M)
  ]
  assert not unmarked


def test_flags_in_the_text_exist():
  """Keys of the config are held to their types too."""
  with pytest.raises(Parsed) as status, pytest.MonkeyPatch.context() as patch:
    patch.setattr(argparse.ArgumentParser, "parse_args", _parse_argparse)
    launcher().parse(["status", "--name=dpo", "--zone=z"])
  known = set(status.value.values)
  for module in {module_of(command.words) for command in _COMMANDS} - {""}:
    known |= parse(module).values.keys()
  known |= {f"config.{k}" for k, _ in config_lib.flatten(_default_config())}
  for where, span in _SPANS:
    if not span.startswith("--"):
      continue
    for word in shlex.split(span):
      name, _, value = word.removeprefix("--").partition("=")
      if word.startswith("--") and is_name(name):
        assert name in known, f"{where}: {word}"
        if name.startswith("config.") and value:
          parsed = parse("dpo_jax.train", *_TRAIN, word)
          assert not parsed.error, f"{where}: {word}: {parsed.error}"


_TRAIN = ("--config=configs/hh.py:dpo", "--workdir=runs/dpo")


def _default_config():
  return parse("dpo_jax.train", *_TRAIN).values["config"]


@pytest.mark.parametrize(
  "command",
  [c for c in _COMMANDS if c.words[1:3] == ["-m", "dpo_jax.plan"]],
  ids=lambda c: c.where,
)
def test_a_plan_needs_no_file_that_the_project_does_not_have(
  command, monkeypatch
):
  """On devices of this machine: only libtpu's part is left out."""
  if command.is_span and not command.words[3:]:
    return  # the command's name
  values = parse("dpo_jax.plan", *command.words[3:]).values
  names = ("rows", "row_tokens", "scored_tokens", "vocab_size")
  request = compilation.Request(
    values["config"],
    topology.parse_topology(values["topology"]),
    **{name: values[name] for name in names},
  )
  monkeypatch.chdir(ROOT)
  monkeypatch.setattr(
    topology.Topology,
    "devices",
    lambda wanted: jax.devices()[: wanted.num_chips],
  )
  assert compilation.build(request).batch.tokens.size > 0


@pytest.mark.parametrize("document", DOCUMENTS)
def test_lines_have_at_most_100_columns(document):
  is_page = document == "experiments/RESULTS.md"  # its tables are written
  wide = [
    number
    for number, line in enumerate(_TEXTS[document].splitlines(), 1)
    if len(line) > _WIDTH and not (is_page and line.startswith("|"))
  ]
  assert not wide, f"{document}: lines {wide} have more than {_WIDTH} columns"


def test_the_readme_has_at_most_200_lines():
  lines = _TEXTS["README.md"].splitlines()
  assert len(lines) <= 200
  assert max(map(len, lines)) <= 99


def test_the_readme_starts_with_the_main_job_and_the_tests():
  """A new user types the first two shell blocks into a fresh clone."""
  blocks = blocks_of("README.md", _TEXTS["README.md"])
  shells = [block.text for block in blocks if block.language in _SHELLS]
  assert shells[:2] == [
    "pip install -r requirements.txt && python -m experiments.quickstart",
    'pip install -r requirements-test.txt && pytest -m "not slow"',
  ]


def test_the_readme_counts_the_losses():
  from dpo_jax.losses import CATALOGUE

  text = _TEXTS["README.md"]
  assert f"[{len(CATALOGUE)} losses]" in text
  rows = re.findall(r"^\| ([a-z ]+) \| (\d+) \| (.*) \|$", text, re.M)
  counted = collections.Counter(row.group for row in CATALOGUE.values())
  assert sorted(int(n) for _, n, _ in rows) == sorted(counted.values())
  for _, number, examples in rows:
    groups = {
      CATALOGUE[name].group for name in re.findall(r"`(\w+)`", examples)
    }
    assert [counted[group] for group in groups] == [int(number)]


def anchors_of(text):
  """Anchors of a document's headings, as GitHub makes them."""
  headings = re.findall(r"^#+ (.*)$", text, re.M)
  return {
    re.sub(r"[^\w -]", "", h.lower()).strip().replace(" ", "-")
    for h in headings
  }


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files_and_headings(document):
  text = re.sub(r"^```.*?^```", "", _TEXTS[document], flags=re.M | re.S)
  for target in re.findall(r"\]\(([^)\s]+)\)", text):
    if "://" in target:
      continue
    name, _, anchor = target.partition("#")
    path = (ROOT / document).parent / name if name else ROOT / document
    assert path.exists(), f"{document}: {target}"
    if anchor:
      assert anchor in anchors_of(path.read_text()), f"{document}: {target}"


_FOLDERS = ("benchmarks", "configs", "docs", "dpo_jax", "examples")
_PATH = re.compile(
  rf"({'|'.join(_FOLDERS)}|experiments|scripts|tests|\.ci)(/[\w.-]+)+/?"
)


def test_files_in_the_text_exist():
  for where, span in _SPANS:
    if _PATH.fullmatch(span) and is_name(span.removesuffix(".md")):
      assert (ROOT / span).exists(), f"{where}: {span}"


def test_keys_in_the_text_exist():
  """Keys stand without their dashes too: `loss.beta=0.1`."""
  known = {key for key, _ in config_lib.flatten(_default_config())}
  known |= {key.rpartition(".")[0] for key in known}
  rooms = {key.partition(".")[0] for key in known} - {""}
  for where, span in _SPANS:
    match = re.fullmatch(r"(\w+)((?:\.\w+)+)(?:=\S*)?", span)
    if match and match[1] in rooms and is_name(match[1] + match[2]):
      key = match[1] + match[2]
      is_file = key.endswith((".json", ".py", ".png", ".md"))
      assert is_file or key in known, f"{where}: {span}"


def _run_script(name):
  """Runs a script as a module, without its command."""
  return runpy.run_path(str(ROOT / "scripts" / name))


def test_the_guide_from_trl_and_the_errors_name_the_same_keys():
  keys = dict(config_lib.flatten(config_lib.default_config()))
  known = {*keys, *CATALOGUE}
  named = {}
  for line in (ROOT / "docs/from_trl.md").read_text().splitlines():
    cells = [re.findall("`([^`=]+)", cell) for cell in line.split("|")[1:3]]
    for theirs, ours in zip(*cells, strict=False) if line[:3] == "| `" else ():
      theirs = theirs.removeprefix("peft_config.")
      is_same = theirs in (ours, ours.rpartition(".")[2], *CATALOGUE)
      if ours in known and not is_same:
        named[theirs] = ours
  assert len(named) > 40
  assert named.items() <= PEERS.items()
  assert set(PEERS.values()) <= known


def test_the_recipes_are_those_of_the_configs():
  """Names of policy and data too; `*` in a variant stands for any loss."""
  text = (ROOT / "docs/recipes.md").read_text()
  for section in re.split("^## ", text, flags=re.M)[1:]:
    path = re.match(r"`configs/(\w+)\.py`", section)
    if not path:
      continue
    module = importlib.import_module(f"configs.{path[1]}")
    rows = [x for x in section.splitlines() if x.startswith("| `")]
    named = []
    for row in rows:
      pattern = row.split("`")[1]
      found = fnmatch.filter(module.VARIANTS, pattern)
      assert found, f"{path[1]}.py has no {pattern}"
      named += found
      for variant in found:
        config = module.get_config(variant)
        places = [config.policy.init, config.data.source or ""]
        places += [entry["source"] for entry in config.data.sources]
        for place in filter(None, places):
          name = re.sub("@.*", "", place).rpartition("/")[2]
          name = re.sub(r"^\w+:(\w+):.*", r"\1", name)
          words = {"random", *re.findall(r"[\w.-]+", row)}
          assert name in words, f"{row}: {name}"
    assert sorted(named) == sorted(module.VARIANTS), path[1]


def test_the_layout_is_that_of_the_modules():
  text = _run_script("write_layout.py")["render"]()
  message = "run python scripts/write_layout.py"
  assert _TEXTS["docs/layout.md"] == text, message


def test_the_measurements_are_those_of_the_json():
  message = "run python -m benchmarks.results"
  assert _TEXTS["benchmarks/RESULTS.md"] == results.render(), message


def test_the_readme_has_the_ratios_of_the_measurements():
  speed = _TEXTS["README.md"].partition("## Speed")[2].partition("\n## ")[0]
  ratios = re.findall(r"\| ([\d.]+) (?=\|)", speed)
  measured = re.findall(r"\| ([\d.]+) \|$", results.render(), re.M)
  assert ratios and set(ratios) <= set(measured)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_blocks_run(document, tmp_path, monkeypatch):
  """One after the other; a new loss in the modules that it is for."""
  monkeypatch.chdir(tmp_path)
  names = vars(links) | vars(rows)
  for block in _BLOCKS:
    if block.where.startswith(f"{document}:") and block.language == "python":
      exec(compile(block.text, block.where, "exec"), names)
  if "get_config" in names:
    check_config(names["get_config"]())


@pytest.fixture
def project(tmp_path, monkeypatch):
  """A folder in which commands of this project are tiny, and their PATH."""
  for name in ("configs", "dpo_jax", "experiments"):
    (tmp_path / name).symlink_to(ROOT / name)
  python = tmp_path / "bin" / "python"
  python.parent.mkdir()
  tiny_flags = shlex.join(_TINY)
  python.write_text(
    "#!/bin/bash\n"
    f'[ $2 = dpo_jax.train ] && exec {sys.executable} "$@" {tiny_flags}\n'
    f'exec {sys.executable} "$@"\n'
  )
  python.chmod(0o755)
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("PATH", f"{python.parent}:{os.environ['PATH']}")
  monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
  monkeypatch.setenv(
    "XLA_FLAGS", os.environ["XLA_FLAGS"].replace("count=8", "count=1")
  )


def write_inputs(text):
  """Writes the models and data that commands name."""
  policy = tiny.make_policy(vocab_size=384)
  for folder in set(re.findall(r"=hf:(\S+)", text)):
    params = policy.init(jax.random.key(1))
    huggingface.save_params(folder, policy, params, dtype="float32")
    write_folder(pathlib.Path(folder))
  rows = [
    {"prompt": f"question {i}", "chosen": f" yes {i}", "rejected": " no"}
    for i in range(60)
  ]
  for file in set(re.findall(r"=jsonl:(\S+)", text)):
    opener = gzip.open if file.endswith(".gz") else open
    with opener(file, "wt") as output:
      output.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize(
  "block", [b for b in _BLOCKS if b.is_run], ids=lambda b: b.where
)
def test_a_block_marked_to_run_runs_as_it_is_printed(block, project):
  write_inputs(block.text)
  done = subprocess.run(
    ["bash", "-e", "-c", block.text],
    check=False,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    timeout=120,
  )
  assert done.returncode == 0, done.stdout
