"""Docstrings, comments and documents read as plain English.

Each rule is mechanical, and docs/style.md gives the reasons. Text between
backticks and in code blocks is not English, and is skipped.
"""

import ast
from collections.abc import Iterator
import io
import pathlib
import re
import tokenize

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# Rooms and folders that are not checked yet. The aim is ().
_NOT_YET: tuple[str, ...] = ()

_OPENINGS = ("Of", "What", "Who", "Where", "Whose")
# An entry of Args, Attributes or Returns that does not name the thing first.
_ENTRY = re.compile(
  r"^ {2,}\*{0,2}\w+: (of|that|what|who|whose|where)\b", re.M | re.I
)
# Words before which `else` and `behind` are plain English.
_NOT_ELSE = r"(?<!thing )(?<!\bwhat )"
_NOT_BEHIND = r"(?<!\bleft )(?<!\bleaves )(?<!\bstays )(?<!\bfar )"
_BANNED: dict[str, str] = {
  r"anew": "again",
  rf"{_NOT_BEHIND}behind": "after",
  r"beside": "next to, with",
  r"besides": "also, except",
  rf"{_NOT_ELSE}else": "otherwise",
  r"(?:go|goes|going|went) on": "continue, resume",
  r"hence": "so, therefore",
  r"(?:him|her)self": "itself",
  r"(?<!\bthere )(?:is|are|was|were) no(?= (?!longer|more|less)\w)": "is not a",
  r"lies?": "is",
  r"nobody": "no caller, no process",
  r"outright": "explicitly",
  r"pulls?": "gradient",
  r"whatever": "any",
}
_PHRASES = {
  re.compile(rf"\b{phrase}\b", re.I): better
  for phrase, better in _BANNED.items()
}


def files() -> list[pathlib.Path]:
  """Modules and documents of the project."""
  folders = ("dpo_jax", "configs", "experiments", "benchmarks", "scripts")
  folders += ("examples", "tests")
  found = [p for f in folders for p in (ROOT / f).rglob("*.py")]
  for folder in (".", "docs", "experiments", "benchmarks"):
    found += (ROOT / folder).glob("*.md")
  return sorted(found)


def is_checked(path: pathlib.Path) -> bool:
  name = path.relative_to(ROOT).as_posix().removeprefix("dpo_jax/")
  if name.endswith(".md"):
    return name not in _NOT_YET
  return not any(
    name == f"{room}.py" or name.startswith(f"{room}/") for room in _NOT_YET
  )


CHECKED = [
  path.relative_to(ROOT).as_posix() for path in files() if is_checked(path)
]


def docstrings(text: str) -> Iterator[tuple[int, str]]:
  """Yields line and docstring of a module and all that it defines."""
  kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, kinds):
      docstring = ast.get_docstring(node)
      if docstring:
        yield node.body[0].lineno, docstring


def comments(text: str) -> Iterator[tuple[int, str]]:
  """Yields line and text of each block of comments."""
  block, first, last = [], 0, -1
  for token in tokenize.generate_tokens(io.StringIO(text).readline):
    if token.type == tokenize.COMMENT:
      if token.start[0] != last + 1 and block:
        yield first, " ".join(block)
        block = []
      first = token.start[0] if not block else first
      last = token.start[0]
      block.append(token.string.lstrip("# "))
  if block:
    yield first, " ".join(block)


def prose(text: str) -> str:
  """Removes code from English: blocks, spans and indented commands."""
  text = re.sub(
    r"^```.*?^```", lambda m: "\n" * m[0].count("\n"), text, flags=re.M | re.S
  )
  text = re.sub(r"^ +(python|pip) .*(\\\n.*)*$", "", text, flags=re.M)
  return re.sub(r"`[^`]+`", "``", text)


def banned(line: int, text: str) -> list[str]:
  """Returns one message for each banned phrase."""
  text = " ".join(prose(text).split())
  return [
    f"line {line}: write {better!r} for {match[0]!r}:"
    f" ...{text[max(match.start() - 30, 0) : match.end() + 20]}..."
    for phrase, better in _PHRASES.items()
    for match in phrase.finditer(text)
  ]


def faults(name: str) -> list[str]:
  """Returns what is wrong in a file, a message each."""
  text = (ROOT / name).read_text()
  if name.endswith(".md"):
    blocks = prose(text).split("\n\n")
    return [
      fault
      for i, block in enumerate(blocks)
      for fault in banned(1 + "\n\n".join(blocks[:i]).count("\n"), block)
    ]
  found = []
  for line, docstring in docstrings(text):
    opening = docstring.split()[0].rstrip(".,:")
    if opening in _OPENINGS:
      found.append(f"line {line}: the docstring opens with {opening!r}")
    found += [
      f"line {line}: name the thing first in {match[0].strip()!r}"
      for match in _ENTRY.finditer(docstring)
    ]
    found += banned(line, docstring)
  for line, comment in comments(text):
    found += banned(line, comment)
  return found


@pytest.mark.parametrize("name", CHECKED)
def test_text_is_plain_english(name):
  found = faults(name)
  assert not found, f"{name}:\n" + "\n".join(found)


@pytest.mark.parametrize(
  "text",
  [
    '"""Of a run."""',
    '"""Computes it.\n\n  Args:\n    workdir: of the run.\n  """',
    "x = 1  # hence it is",
    "# a value that is\n# no number",
    "x = 1  # it is checked or else fails",
  ],
)
def test_a_rule_finds_what_it_is_for(text, tmp_path, monkeypatch):
  monkeypatch.setitem(globals(), "ROOT", tmp_path)
  (tmp_path / "a.py").write_text(text + "\n")
  assert len(faults("a.py")) == 1


@pytest.mark.parametrize(
  "text",
  [
    '"""Computes what `hence` is."""',
    "x = 1  # there is no other",
    "x = 1  # nothing else is no longer here",
    "x = 'hence'",
  ],
)
def test_plain_text_passes(text, tmp_path, monkeypatch):
  monkeypatch.setitem(globals(), "ROOT", tmp_path)
  (tmp_path / "a.py").write_text(text + "\n")
  assert not faults("a.py")


def test_every_unchecked_room_has_faults_left():
  """A room that is clean leaves the list."""

  def names(room):
    return [
      path.relative_to(ROOT).as_posix()
      for base in (ROOT, ROOT / "dpo_jax")
      for path in (base / f"{room}.py", *(base / room).rglob("*.py"))
      if path.is_file()
    ]

  clean = [r for r in _NOT_YET if not any(map(faults, names(r)))]
  assert not clean, f"take off _NOT_YET: {clean}"
