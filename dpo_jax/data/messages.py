"""Messages of a conversation, cleaned of what tables and APIs add to them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dpo_jax.system import files

Message = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
# Characters that the contents of a prompt, or of a response, may have.
MAX_CHARS = 2_000_000


class RecordError(ValueError):
  """Broken record; the message names file and line."""


class Unusable(Exception):
  """Well-formed record that teaches nothing; dropped and counted."""

  def __init__(self, reason: str):
    super().__init__(reason)
    self.reason = reason


def read_messages(
  messages: Sequence[Any], where: str, roles: Mapping[str, str] | None = None
) -> list[Message]:
  """Cleans the messages of one conversation.

  Keys that are null are dropped at every depth, because tables fill them in;
  a message's own `content` may be null. Content parts of text are joined.
  `tool_calls` may be JSON text, whose nulls are kept.

  Args:
    messages: one conversation. Content may be null or absent where another
      key, such as `tool_calls`, says what the turn is.
    where: file and line, for errors.
    roles: role in the data -> one of ROLES, or the same role where only the
      chat template knows it.

  Returns:
    Messages with a role of ROLES, or one that `roles` gives. Content is text,
    or null, absent or an object where the data have it so.

  Raises:
    RecordError: a message without a role, of an unknown role, with neither
      content nor another key, with a content part that is not text, or with
      `tool_calls` in text that is not a JSON list.
  """
  return [_read_message(message, where, roles or {}) for message in messages]


def _read_message(
  message: Any, where: str, roles: Mapping[str, str]
) -> Message:
  is_whole = isinstance(message, Mapping) and "role" in message
  if is_whole and message.get("content") is None:
    is_whole = has_content(message)
  if not is_whole:
    raise RecordError(
      f"{where}: a message must have 'role' and 'content', or 'tool_calls'"
      f" where the content is null, and one is {message!r:.80}"
    )
  role = message["role"]
  role = roles.get(role, role) if isinstance(role, str) else role
  if role not in ROLES and role not in roles.values():
    raise RecordError(
      f"{where}: the role {role!r} is unknown; known roles are"
      f" {', '.join(ROLES)}. data.roles='{role}=ROLE' reads it as one of"
      f" these, and data.roles='{role}={role}' leaves it to the chat template"
    )
  clean = {**drop_nulls(message), "role": role}
  if "content" in message:
    clean["content"] = _read_content(message["content"], where)
  if isinstance(clean.get("tool_calls"), str):
    clean["tool_calls"] = read_json(
      clean["tool_calls"], "tool_calls", where, list
    )
  return clean


def _read_content(content: Any, where: str) -> Any:
  """Returns the content of a message, cleaned.

  Content parts of the type 'text' are joined to one text. Text, null and
  objects stay, without keys that are null.

  Raises:
    RecordError: a content part that is not text.
  """
  if isinstance(content, str) or not isinstance(content, Sequence):
    return drop_nulls(content)
  texts = []
  for part in content:
    kind = part.get("type") if isinstance(part, Mapping) else type(part)
    if kind != "text" or not isinstance(part.get("text"), str):
      raise RecordError(
        f"{where}: a message holds a content part of the type {kind!r}; only"
        " parts of the type 'text' can be read"
      )
    texts.append(part["text"])
  return "".join(texts)


def drop_nulls(value: Any) -> Any:
  """Returns a value without the keys whose value is null, at every depth.

  Items of lists stay, also those that are null.
  """
  if isinstance(value, Mapping):
    return {k: drop_nulls(v) for k, v in value.items() if v is not None}
  if isinstance(value, list):
    return [drop_nulls(item) for item in value]
  return value


def read_json(text: str, name: str, where: str, kind: type) -> Any:
  """Reads a column of JSON text that must hold a list or an object.

  Args:
    text: JSON.
    name: name of the column, for errors.
    where: file and line, for errors.
    kind: list or dict, the type of the result.

  Raises:
    RecordError: text that is not JSON, or JSON of another type.
  """
  try:
    value = files.parse_json(text)
  except ValueError as error:
    raise RecordError(f"{where}: {name} is not JSON: {error}") from error
  if not isinstance(value, kind):
    raise RecordError(
      f"{where}: {name} must be a {kind.__name__}, and is"
      f" {type(value).__name__}"
    )
  return value


def read_extras(record: Mapping[str, Any], where: str) -> dict[str, Any]:
  """Reads the variables of a chat template that a record sets.

  TRL's columns `tools`, a list, and `chat_template_kwargs`, an object, are
  read. Each may be JSON text, whose nulls are kept; otherwise keys that are
  null are dropped.

  Returns:
    The keys of `chat_template_kwargs`, and "tools" where there are any.

  Raises:
    RecordError: a column of another type, or chat_template_kwargs that set
      `messages` or `add_generation_prompt`.
  """
  found: dict[str, Any] = {}
  for name, kind in (("tools", list), ("chat_template_kwargs", dict)):
    value = record.get(name)
    if isinstance(value, str):  # tables without nested columns
      value = read_json(value, name, where, kind) if value else None
    else:
      value = drop_nulls(value)
    if not value:
      continue
    if not isinstance(value, kind):
      raise RecordError(
        f"{where}: {name} must be a {kind.__name__}, and is"
        f" {type(value).__name__}"
      )
    found |= {"tools": value} if name == "tools" else value
  ours = sorted(found.keys() & {"messages", "add_generation_prompt"})
  if ours:
    raise RecordError(
      f"{where}: chat_template_kwargs may not set {', '.join(ours)}"
    )
  return found


def cut_start(messages: list[Message]) -> list[Message]:
  """Cuts a prompt's content to its last MAX_CHARS characters.

  They are counted over all messages. Messages before them stay, with the
  content "".
  """
  return _cut(messages[::-1], lambda text, room: text[len(text) - room :])[::-1]


def cut_end(messages: list[Message]) -> list[Message]:
  """Cuts a response's content to its first MAX_CHARS characters.

  They are counted over all messages. Messages after them stay, with the
  content "".
  """
  return _cut(messages, lambda text, room: text[:room])


def _cut(
  messages: list[Message], keep: Callable[[str, int], str]
) -> list[Message]:
  room, kept = MAX_CHARS, []
  for message in messages:
    content = message.get("content")
    if isinstance(content, str):
      if len(content) > room:
        message = {**message, "content": keep(content, room)}
      room -= min(room, len(content))
    kept.append(message)
  return kept


def as_turns(response: Any) -> Any:
  """Returns a response as a list of messages.

  Text becomes one message of the assistant, and one message a list. Any other
  value is returned as it is.
  """
  if isinstance(response, str):
    return [{"role": "assistant", "content": response}]
  return [response] if isinstance(response, Mapping) else response


def is_answer(message: Any) -> bool:
  return isinstance(message, Mapping) and message.get("role") == "assistant"


def is_messages(value: Any) -> bool:
  return isinstance(value, Sequence) and not isinstance(value, str)


def has_content(message: Message) -> bool:
  """Returns whether a message says anything, such as text or tool calls.

  It does if a key other than `role` and `name` holds text that is not blank, or
  a list or an object that is not empty.
  """
  values = [v for k, v in message.items() if k not in ("role", "name")]
  return any(v.strip() if isinstance(v, str) else _is_filled(v) for v in values)


def _is_filled(value: Any) -> bool:
  # A number or a flag, such as a weight, is about the message.
  return isinstance(value, Sequence | Mapping) and bool(value)


def check_unicode(texts: Sequence[str], where: str) -> None:
  """Raises RecordError for a text with half of a surrogate pair.

  JSON can spell it, and UTF-8 cannot.
  """
  for text in texts:
    try:
      text.encode("utf-8")
    except UnicodeEncodeError as error:
      raise RecordError(
        f"{where}: text that is not Unicode: {error}"
      ) from error
