"""Reads tokenizer.json, and tokens that other files of its folder add."""

from collections.abc import Collection, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import json
import reprlib
from typing import Any

from etils import epath
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from dpo_jax.data.spellings import Spellings
from dpo_jax.system import files
from dpo_jax.system.inputs import existing, is_there

# Ids of a vocabulary, at most.
MAX_IDS = 2**24


@dataclasses.dataclass(frozen=True)
class JsonFile:
  """JSON file of a tokenizer's folder.

  Attributes:
    path: its path.
    values: its keys; {} if the file does not exist.
  """

  path: epath.Path
  values: Mapping[str, Any]

  @classmethod
  def read(cls, path: epath.Path) -> "JsonFile":
    """Reads a file, if it is there.

    Raises:
      ValueError: it is damaged, or holds half of a character; names the key.
    """
    values = files.read_json(path) if is_there(path) else {}
    for key, value in values.items():
      try:
        json.dumps([key, value], ensure_ascii=False).encode()
      except UnicodeEncodeError as error:
        raise ValueError(
          f"{path}: {key!a} holds text that is not Unicode: {error}. Write the"
          " whole character"
        ) from error
    return cls(path, values)

  def get(self, key: str) -> Any:
    """Returns the value of a key of the file, or None if it is not there."""
    return self.values.get(key)

  def token(self, key: str) -> str:
    """Returns the text of a special token; "" without one.

    Raises:
      ValueError: a value that is neither text nor an object with `content`.
    """
    value = self.get(key)
    text = value.get("content") if isinstance(value, dict) else value
    if value is None or isinstance(text, str):
      return text or ""
    raise self._odd(key, "text, or an object with the text 'content'")

  def ids(self, key: str) -> list[int]:
    """Returns the ids of a key that holds none, one, or a list of them.

    Raises:
      ValueError: a value that is not an id below MAX_IDS.
    """
    value = self.get(key)
    found = value if isinstance(value, list) else [value]
    if value is None:
      return []
    if all(type(i) is int and 0 <= i < MAX_IDS for i in found):
      return found
    raise self._odd(key, f"ids from 0 to {MAX_IDS - 1:,}")

  def _odd(self, key: str, allowed: str) -> ValueError:
    shown = reprlib.repr(self.get(key))
    return ValueError(f"{self.path}: {key}={shown} must be {allowed}")

  def added_tokens(self) -> dict[int, tokenizers.AddedToken]:
    """Returns the tokens of the key `added_tokens_decoder`, by id.

    Raises:
      ValueError: the file is damaged.
    """
    with _naming(self.path):
      return {
        int(i): tokenizers.AddedToken(
          **{k: v for k, v in token.items() if k != "__type"}
        )
        for i, token in (self.get("added_tokens_decoder") or {}).items()
      }

  def chat_template(self) -> str | None:
    """Returns the chat template, of several `default`; None without one."""
    template = self.get("chat_template")
    if isinstance(template, list):
      with _naming(self.path):
        by_name = {entry["name"]: entry["template"] for entry in template}
      template = by_name.get("default")
    if template is None or isinstance(template, str):
      return template
    raise self._odd("chat_template", "text, or a list of named templates")


@contextlib.contextmanager
def _naming(path: object) -> Iterator[None]:
  """Turns any error of its block into a ValueError: `path` is damaged."""
  try:
    yield
  except Exception as error:  # tokenizers raises no narrower class
    raise ValueError(
      f"{path} is damaged: {error!r:.300}. Restore it from a copy"
    ) from error


class Encoder:
  """Tokenizer of a tokenizer.json.

  Args:
    text: content of the file.
    path: its path, for errors.

  Attributes:
    plain: the tokenizer; special tokens in a text are letters to it.
    spellings: its special tokens.
  """

  def __init__(self, text: str, path: object):
    self._text, self._path = text, path
    self.plain, self._with_specials = _build(text), _build(text)
    self.plain.encode_special_tokens = True

  def name_special(self, named: Collection[str]) -> None:
    """Makes the added tokens special whose spelling `named` holds.

    It must be called before `spellings` is read, which is computed once.
    """
    for token in self.plain.get_added_tokens_decoder().values():
      if token.content in named and not token.special:
        for tokenizer in (self.plain, self._with_specials):
          tokenizer.add_special_tokens(
            [_same_kind(token, token.content, special=True)]
          )

  @functools.cached_property
  def spellings(self) -> Spellings:
    added = self.plain.get_added_tokens_decoder().values()
    return Spellings([token.content for token in added if token.special])

  def encode(
    self, texts: Sequence[str], *, is_rendered: bool
  ) -> list[list[int]]:
    """Returns ids of each text; see `Tokenizer.encode`."""
    tokenizer = self._with_specials if is_rendered else self.plain
    with _naming(self._path):
      encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    ids = [one.ids for one in encoded]
    if is_rendered:
      for i, text in enumerate(texts):
        if self.spellings.is_hidden_in(text):
          ids[i] = self._encode_hidden(text)
    return ids

  def _encode_hidden(self, text: str) -> list[int]:
    """Encodes rendered text in which messages spell special tokens.

    The template's own tokens become their ids: they are written as marks first.
    Spellings in messages are letters again.
    """
    tokenizer, own = self._marked
    text = self.spellings.mark(text)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return [own.get(i, i) for i in ids]

  @functools.cached_property
  def _marked(self) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
    """Returns a tokenizer that knows marks, and mark's id -> special id."""
    tokenizer = _build(self._text)
    tokenizer.encode_special_tokens = True
    added = self.plain.get_added_tokens_decoder().values()
    tokens = {token.content: token for token in added}
    marks = self.spellings.marks
    tokenizer.add_tokens(
      [_same_kind(tokens[t], mark, special=False) for t, mark in marks.items()]
    )
    own = {}
    for token, mark in marks.items():
      mark_id, own_id = (
        tokenizer.token_to_id(mark),
        self.plain.token_to_id(token),
      )
      assert mark_id is not None and own_id is not None
      own[mark_id] = own_id
    return tokenizer, own


def _build(text: str) -> tokenizers.Tokenizer:
  tokenizer = tokenizers.Tokenizer.from_str(text)
  tokenizer.no_truncation()
  tokenizer.no_padding()
  return tokenizer


def _same_kind(
  token: tokenizers.AddedToken, content: str, *, special: bool
) -> tokenizers.AddedToken:
  """Returns a token that strips spaces as `token` does, never normalized.

  Args:
    token: added token.
    content: spelling of the result.
    special: whether the result is special.
  """
  return tokenizers.AddedToken(
    content,
    lstrip=token.lstrip,
    rstrip=token.rstrip,
    single_word=token.single_word,
    normalized=False,
    special=special,
  )


def read_tokenizer(root: epath.Path, config: JsonFile) -> str:
  """Returns the text of a tokenizer.json, with tokens that other files add.

  Without tokenizer.json it is made of GPT-2's vocab.json and merges.txt.

  Args:
    root: folder of the tokenizer.
    config: its tokenizer_config.json.

  Raises:
    FileNotFoundError: neither tokenizer.json nor the two files.
    ValueError: a damaged file, an id of MAX_IDS or more, or an added token
      whose id is not the next free one.
  """
  path = root / "tokenizer.json"
  is_pair = not is_there(path)
  if not is_pair:
    text = files.read_text(path)
  elif is_there(root / "vocab.json") and is_there(root / "merges.txt"):
    text = _byte_level(root, config).to_str()
  else:
    raise FileNotFoundError(
      f"{path} does not exist; a tokenizer is a folder with tokenizer.json, or"
      " with vocab.json and merges.txt, or 'bytes'"
    )
  added = config.added_tokens()
  others = JsonFile.read(root / "added_tokens.json")
  for token in others.values:
    for i in others.ids(token):
      added.setdefault(i, tokenizers.AddedToken(token, special=True))
  with _naming(path):
    whole = tokenizers.Tokenizer.from_str(text)
    largest = max(whole.get_vocab().values(), default=0)
    if largest >= MAX_IDS:  # tokenizers would loop over all of them
      raise ValueError(f"ids must be below {MAX_IDS:,}, and one is {largest:,}")
  missing = [
    i for i in sorted(added) if whole.token_to_id(added[i].content) is None
  ]
  for i in missing:
    whole.add_tokens([added[i]])
    if whole.token_to_id(added[i].content) != i:
      raise ValueError(
        f"{config.path} or {others.path.name}: the added token"
        f" {added[i].content!r} has the id {i}, and the next free one is"
        f" {whole.token_to_id(added[i].content)}"
      )
  if is_pair and config.get("add_bos_token"):
    # Without a tokenizer.json, whose steps would decide, the key counts.
    _put_bos(whole, config.token("bos_token") or "<|endoftext|>")
    return whole.to_str()
  return whole.to_str() if missing else text


def _put_bos(tokenizer: tokenizers.Tokenizer, bos: str) -> None:
  """Makes a tokenizer put a BOS before every text.

  Does nothing if the spelling `bos` is not in the vocabulary.
  """
  bos_id = tokenizer.token_to_id(bos)
  if bos_id is not None:
    tokenizer.post_processor = processors.TemplateProcessing(
      single=f"{bos} $A", special_tokens=[(bos, bos_id)]
    )


def _byte_level(root: epath.Path, config: JsonFile) -> tokenizers.Tokenizer:
  """Reads GPT-2's byte-level BPE from its two files."""
  file = JsonFile.read(root / "vocab.json")
  vocab = {token: i for token in file.values for i in file.ids(token)}
  lines = files.read_text(root / "merges.txt").split("\n")
  merges = [
    (first, second)
    for first, _, second in (line.partition(" ") for line in lines)
    if first.strip() and not first.startswith("#version")
  ]
  with _naming(f"{root / 'vocab.json'} or merges.txt"):
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
    add_prefix_space=bool(config.get("add_prefix_space"))
  )
  tokenizer.decoder = decoders.ByteLevel()
  if "<|endoftext|>" in vocab:
    tokenizer.add_special_tokens(["<|endoftext|>"])
  return tokenizer


def without_beginnings(text: str) -> str | None:
  """Returns the tokenizer.json for a text in the middle of a sequence.

  Sentencepiece's kind, and GPT-2's where it is told to, put a space before a
  text's first word that is not in the text.

  Args:
    text: a tokenizer.json.

  Returns:
    The same without that step, or None if it has none.
  """

  def strip(node: Any) -> Any:
    if isinstance(node, list):
      return [strip(n) for n in node if n.get("type") != "Prepend"]
    if not isinstance(node, Mapping) or node.get("type") == "Prepend":
      return None
    node = dict(node)
    if node["type"] == "Metaspace":
      node.pop("add_prefix_space", None)  # what older files have instead
      node["prepend_scheme"] = "never"
    elif node["type"] == "ByteLevel":
      node["add_prefix_space"] = False
    elif node["type"] == "Sequence":
      key = "normalizers" if "normalizers" in node else "pretokenizers"
      node[key] = strip(node[key])
    return node

  whole = json.loads(text)
  steps = {key: whole.get(key) for key in ("normalizer", "pre_tokenizer")}
  stripped = {key: strip(step) for key, step in steps.items()}
  return json.dumps(whole | stripped) if stripped != steps else None


def find_template(
  root: epath.Path, config: JsonFile, override: str
) -> str | None:
  """Returns the chat template of a tokenizer's folder, or None.

  Args:
    root: folder; chat_template.jinja precedes `config`.
    config: its tokenizer_config.json.
    override: path of a jinja file to use instead; "" for none.

  Raises:
    FileNotFoundError: `override` does not exist.
  """
  if override:
    return files.read_text(existing(override))
  if is_there(root / "chat_template.jinja"):
    return files.read_text(root / "chat_template.jinja")
  return config.chat_template()
