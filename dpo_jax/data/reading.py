"""Renames columns and roles of records, and finds their shapes."""

from collections.abc import Iterable, Iterator, Mapping
import dataclasses
import difflib
import json
from typing import Any, NamedTuple

from dpo_jax.config import parse_pairs
from dpo_jax.data.formats import FORMATS, OPTIONAL, SHAPES, Record
from dpo_jax.data.messages import (
  RecordError,
  Unusable,
  as_turns,
  is_messages,
  read_messages,
)

# Which turns of a conversation are scored.
SCORED_TURNS = ("last", "all")
# How special tokens are read that are spelled in the data.
SPECIAL_TOKENS = ("letters", "read")
# Columns of messages, where they are lists.
_MESSAGES = ("prompt", "chosen", "rejected", "completion", "messages")
# Columns that carry input. Those that a shape does not read are refused,
# unless they are empty or the prompt holds their text.
_INPUTS = frozenset(
  {
    *("system_prompt", "history", "context", "input", "instruction"),
    *("question", "documents", "image", "images", "audios", "videos"),
  }
)


@dataclasses.dataclass(frozen=True)
class Reading:
  """Settings for reading records, from `config.data`.

  Attributes:
    format: name in SHAPES; "" finds it by a record's columns.
    columns: "OURS=THEIRS,...", names of columns; "THEIRS=" leaves one out.
    roles: "THEIRS=OURS,...", roles of messages.
    scored_turns: one of SCORED_TURNS; see `examples.parse_records`.
    special_tokens: one of SPECIAL_TOKENS.
    max_broken_records: broken records to leave out; one more stops the run.

  Raises:
    ValueError: a value that is not allowed, with those that are.
  """

  format: str = ""
  columns: str = ""
  roles: str = ""
  scored_turns: str = "last"
  special_tokens: str = "letters"
  max_broken_records: int = 0

  def __post_init__(self):
    for key, allowed in (
      ("format", ("", *SHAPES)),
      ("scored_turns", SCORED_TURNS),
      ("special_tokens", SPECIAL_TOKENS),
    ):
      value = getattr(self, key)
      if value not in allowed:
        raise ValueError(
          f"data.{key}={value!r} must be one of {', '.join(allowed)}"
        )
    known = OPTIONAL.union(*(s.needs | s.reads for s in SHAPES.values()))
    for ours, theirs in self.column_names().items():
      if theirs and ours not in known:
        raise ValueError(
          f"data.columns={self.columns!r}: no format has a column {ours!r}."
          f" {_near(ours, known) or 'Known: ' + ', '.join(sorted(known))}"
        )
    self.role_names()

  def column_names(self) -> dict[str, str]:
    """Returns our names of columns -> the data's.

    The data's name of a column to leave out -> "".
    """
    return parse_pairs(
      self.columns, "data.columns", "prompt=question,system=sys"
    )

  def role_names(self) -> dict[str, str]:
    """Returns roles in the data -> ours."""
    return parse_pairs(self.roles, "data.roles", "human=user,bot=assistant")


@dataclasses.dataclass
class Seen:
  """Notes on the records that were read.

  Attributes:
    records: number of them.
    shapes: number of records of each of SHAPES.
    unread: columns that were not read.
  """

  records: int = 0
  shapes: dict[str, int] = dataclasses.field(default_factory=dict)
  unread: set[str] = dataclasses.field(default_factory=set)


@dataclasses.dataclass(frozen=True)
class Shaped:
  """Record of one of FORMATS.

  Attributes:
    where: file and line.
    number: number of the record in its source, from 0; of several, the first.
    kind: one of FORMATS.
    columns: those of the format; their messages are clean.
    is_chat: see `Shape`; a column `system` sets it too.
    inputs: columns that carry input and are not read, as text, which the
      prompt must hold.
    hint: nearest names for columns that may be misspelt, or "".
  """

  where: str
  number: int
  kind: str
  columns: Record
  is_chat: bool
  inputs: Mapping[str, str]
  hint: str


class _Named(NamedTuple):
  """Record with our names of columns.

  Attributes:
    where: file and line.
    number: number in its source, from 0.
    shape: one of SHAPES.
    record: columns by name.
  """

  where: str
  number: int
  shape: str
  record: Record


def shape_records(
  records: Iterable[tuple[str, Record | Exception]],
  reading: Reading,
  seen: Seen,
) -> Iterator[Shaped | Unusable | RecordError]:
  """Rewrites records of any of SHAPES.

  Args:
    records: file and line, and columns by name, or the error of a line that
      holds none.
    reading: names and formats.
    seen: is filled with notes.

  Yields:
    A record of one of FORMATS, or its error. Neighbouring records
    of one prompt become one record where their shape says so.
  """
  columns, roles = reading.column_names(), reading.role_names()
  group: list[_Named] = []
  for where, record in records:
    number, seen.records = seen.records, seen.records + 1
    try:
      if isinstance(record, Exception):
        raise RecordError(str(record)) from record
      record = _rename(record, columns, where)
      name = _find_shape(record, reading.format, where)
    except RecordError as error:
      yield from _end_group(group, roles, seen)
      yield error
      continue
    same = SHAPES[name].same
    last = group[0] if group else None
    if last and (last.shape != name or last.record[same] != record[same]):
      yield from _end_group(group, roles, seen)
    seen.shapes[name] = seen.shapes.get(name, 0) + 1
    group.append(_Named(where, number, name, record))
    if not same:
      yield from _end_group(group, roles, seen)
  yield from _end_group(group, roles, seen)


def _end_group(
  group: list[_Named],
  roles: Mapping[str, str],
  seen: Seen,
) -> Iterator[Shaped | Unusable | RecordError]:
  """Yields the one record, or the error, that a group becomes.

  Yields nothing for an empty group.

  Args:
    group: neighbouring records with the same prompt; is emptied.
    roles: role in the data -> ours.
    seen: is filled with notes.
  """
  if not group:
    return
  first = group[0]
  needs = SHAPES[first.shape].needs if SHAPES[first.shape].same else ()
  lists = {key: [one.record[key] for one in group] for key in needs}
  first = first._replace(record={**first.record, **lists})
  group.clear()
  try:
    yield _shape(first, roles, seen)
  except (RecordError, Unusable) as fault:
    yield fault
  except RecursionError:
    yield RecordError(f"{first.where}: the record is nested too deeply")


def _rename(
  record: Record, columns: Mapping[str, str], where: str
) -> dict[str, Any]:
  """Gives columns our names, and leaves out those that are to be left out.

  A null prompt and null columns of input are left out too. Other nulls stay: a
  label that is null must not turn feedback into a demonstration.

  Args:
    record: columns by the data's names.
    columns: our names -> the data's; "" leaves a column out.
    where: file and line, for errors.

  Raises:
    RecordError: a named column is missing, or two get the same name.
  """
  missing = set(filter(None, columns.values())) - record.keys()
  if missing:
    raise RecordError(
      f"{where}: data.columns names {', '.join(sorted(missing))}, and the"
      f" columns are {', '.join(sorted(record))}"
    )
  named = {ours for ours, theirs in columns.items() if theirs}
  if taken := sorted(named & record.keys() - set(columns.values())):
    raise RecordError(
      f"{where}: data.columns gives another column the name {taken[0]!r}, and"
      f" the record has one of that name: rename or delete it in the data"
    )
  renamed = {
    name: value
    for name, value in record.items()
    if name not in columns.values() and columns.get(name) != ""
  }
  renamed |= {
    ours: record[theirs] for ours, theirs in columns.items() if theirs
  }
  return {
    name: value
    for name, value in renamed.items()
    if value is not None or (name != "prompt" and name not in _INPUTS)
  }


def _find_shape(record: Record, name: str, where: str) -> str:
  if not name:
    found = (n for n, shape in SHAPES.items() if shape.needs <= record.keys())
    name = next(found, "")
  elif missing := SHAPES[name].needs - record.keys():
    raise RecordError(
      f"{where}: data.format={name!r} needs the columns"
      f" {', '.join(sorted(missing))} too, and there are"
      f" {', '.join(sorted(record))}"
    )
  if not name:
    raise RecordError(_explain_columns(record, where))
  return name


def _shape(named: _Named, roles: Mapping[str, str], seen: Seen) -> Shaped:
  where, number, name, record = named
  shape = SHAPES[name]
  kept = {key: record[key] for key in record.keys() & OPTIONAL}
  own = {
    key: record[key] for key in record.keys() & (shape.needs | shape.reads)
  }
  unread = {
    key: record[key] for key in record.keys() - kept.keys() - own.keys()
  }
  seen.unread |= unread.keys()
  columns = kept | _rewrite(name, own, where)
  roles = {**shape.roles, **roles}

  def clean(value: Any) -> Any:
    value = as_turns(value) if isinstance(value, Mapping) else value
    return read_messages(value, where, roles) if is_messages(value) else value

  for key in _MESSAGES:
    if key in columns:
      columns[key] = clean(columns[key])
  if is_messages(columns.get("responses")):
    columns["responses"] = [clean(one) for one in columns["responses"]]
  is_whole = is_messages(columns.get("chosen", columns.get("completion")))
  return Shaped(
    where,
    number,
    next(kind for kind, need in FORMATS.items() if need <= columns.keys()),
    columns,
    is_chat=shape.is_chat or "system" in columns,
    inputs=_unread_inputs(unread, is_whole=is_whole),
    hint=near_names(unread),
  )


def _rewrite(name: str, own: Record, where: str) -> dict[str, Any]:
  try:
    return dict(SHAPES[name].rewrite(own))
  except RecordError as error:
    raise RecordError(f"{where}: {error}") from error
  except (LookupError, TypeError, ValueError, AttributeError) as error:
    # A column of another type than the shape's.
    raise RecordError(
      f"{where}: the columns {', '.join(sorted(own))} are those of the format"
      f" {name!r}, and do not hold what its do:"
      f" {type(error).__name__}: {error}"
    ) from error


def _unread_inputs(unread: Record, *, is_whole: bool) -> dict[str, str]:
  """Returns the text of unread columns that carry input, by name.

  Args:
    unread: columns by name.
    is_whole: whether the responses are messages. Then `question` is left out,
      because it is the user's turn, and the responses hold it.
  """
  return {
    name: value if isinstance(value, str) else json.dumps(value, default=repr)
    for name, value in unread.items()
    if name in _INPUTS and value and not (is_whole and name == "question")
  }


def near_names(names: Iterable[str]) -> str:
  """Returns a hint at the columns that may be misspelt, for an error.

  Args:
    names: names of columns.

  Returns:
    Text such as " ('chosn' may be meant for 'chosen')"; "" without any.
  """
  wanted = set().union(*FORMATS.values())
  hints = [
    f"{name!r} may be meant for {near}"
    for name in sorted(names)
    if (near := _near(name, wanted - {name}))
  ]
  return f" ({'; '.join(hints)})" if hints else ""


def _near(name: str, known: Iterable[str]) -> str:
  near = difflib.get_close_matches(name, known, n=1)
  return repr(near[0]) if near else ""


def _explain_columns(record: Record, where: str) -> str:
  known = set().union(*FORMATS.values())
  expected = "; ".join(
    f"{name}: {', '.join(sorted(shape.needs))}"
    for name, shape in SHAPES.items()
  )
  return (
    f"{where}: found the columns {', '.join(sorted(record)) or 'none'}"
    f"{near_names(record.keys() - known)}. Expected one of: {expected}."
    " data.columns='prompt=NAME' gives a column the name that is expected"
  )
