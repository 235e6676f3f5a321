"""Text to token ids: byte-level, or any Hugging Face tokenizer.json.

Prompt and response are encoded apart and their ids joined, so that no token
straddles the border and the split is exact by construction.
"""

from collections.abc import Mapping, Sequence
import datetime
import functools
import hashlib
import json
import logging
from typing import Any, Protocol

from etils import epath
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from dpo_jax.data.dialogues import Request
from dpo_jax.data.messages import Message, RecordError
from dpo_jax.data.templates import ChatTemplate

_LOG = logging.getLogger(__name__)

# Names that a template may read.
_SPECIAL_TOKENS = tuple(
  f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)
# What strftime_now says where nothing else is asked for.
DEFAULT_DATE = "2024-07-26"
# Tokenizers in formats that are not read here.
_UNREAD_FILES = ("tokenizer.model", "spiece.model", "vocab.txt", "*.tiktoken")


class Tokenizer(Protocol):
  """What the data pipeline asks of a tokenizer.

  Attributes:
    vocab_size: ids are below it.
    bos_id: put before every prompt, or None.
    eos_id: put after every response that has no end of its own.
    pad_id: what the tokenizer's files name for padding, or None.
    stop_ids: ids that end a response when it is sampled, `eos_id` first.
    digest: of everything that decides the ids.
    parts: the same by part, digests by name: `vocabulary`, `chat_template`.
    has_chat_template: whether `render` works.
  """

  vocab_size: int
  bos_id: int | None
  eos_id: int
  pad_id: int | None
  stop_ids: tuple[int, ...]
  digest: str
  parts: Mapping[str, str]
  has_chat_template: bool

  def encode(
    self, texts: Sequence[str], *, is_rendered: bool, is_continuation: bool
  ) -> list[list[int]]:
    """Ids of each text, without BOS or EOS of the tokenizer's own.

    Args:
      texts: what to encode.
      is_rendered: whether special tokens spelled in the text are meant. In
        plain text they are letters: a user cannot write an EOS.
      is_continuation: whether the text follows a prompt, so that a tokenizer
        that marks the beginning of a text must not mark it.
    """

  def decode(self, ids: Sequence[int]) -> str:
    """Text of ids, special tokens left out."""

  def render(
    self,
    messages: Sequence[Message],
    header: bool,
    extras: Mapping[str, Any] | None = None,
  ) -> str:
    """Messages as text, by the chat template; see `Request`."""

  def render_batch(
    self, requests: Sequence[Request]
  ) -> list[str | RecordError]:
    """The same for many at once, with the error where one fails."""


class _WithoutTemplate:
  """Refuses messages."""

  has_chat_template = False

  @property
  def parts(self) -> dict[str, str]:
    """See `Tokenizer.parts`."""
    return {"vocabulary": self.digest}

  def render(
    self,
    messages: Sequence[Message],
    header: bool,
    extras: Mapping[str, Any] | None = None,
  ) -> str:
    raise self._refusal()

  def render_batch(
    self, requests: Sequence[Request]
  ) -> list[str | RecordError]:
    return [self._refusal()] * len(requests)

  def _refusal(self) -> RecordError:
    return RecordError(f"the tokenizer {self.digest!r} has no chat template")


class ByteTokenizer(_WithoutTemplate):
  """UTF-8 bytes are ids 0 to 255; 256 is BOS, 257 EOS."""

  vocab_size = 258
  bos_id = 256
  eos_id = 257
  pad_id = None
  stop_ids = (257,)
  digest = "bytes-1"

  def encode(
    self, texts: Sequence[str], *, is_rendered: bool, is_continuation: bool
  ) -> list[list[int]]:
    del is_rendered, is_continuation
    return [list(text.encode("utf-8")) for text in texts]

  def decode(self, ids: Sequence[int]) -> str:
    return bytes(i for i in ids if i < 256).decode("utf-8", "replace")


class LetterTokenizer(_WithoutTemplate):
  """The first letters of the alphabet, for tasks that can be enumerated.

  All texts of such a task have one length, so that no response needs an end:
  EOS is an id that the model's vocabulary does not have, and data.max_tokens
  cuts it off. So probabilities of all texts of that length sum to 1.
  """

  bos_id = None
  pad_id = None

  def __init__(self, num_letters: int):
    """Letters "a", "b", ... are ids 0, 1, ...

    Args:
      num_letters: of them, up to 26.

    Raises:
      ValueError: more letters than there are.
    """
    if not 1 < num_letters <= 26:
      raise ValueError(f"letters:{num_letters} must have 2 to 26 letters")
    self.vocab_size = self.eos_id = num_letters
    self.stop_ids = (self.eos_id,)
    self.digest = f"letters-{num_letters}"

  def encode(
    self, texts: Sequence[str], *, is_rendered: bool, is_continuation: bool
  ) -> list[list[int]]:
    del is_rendered, is_continuation
    ids = [[ord(letter) - ord("a") for letter in text] for text in texts]
    for text, found in zip(texts, ids, strict=True):
      if not all(0 <= i < self.vocab_size for i in found):
        raise RecordError(
          f"{text!r} holds more than the first {self.vocab_size} letters"
        )
    return ids

  def decode(self, ids: Sequence[int]) -> str:
    return "".join(chr(i + ord("a")) for i in ids if i < self.vocab_size)


class HFTokenizer:
  """A folder with tokenizer.json, or with GPT-2's vocab.json and merges.txt.

  What else is there is read as `transformers` reads it: tokenizer_config.json,
  special_tokens_map.json, and a model's config.json and generation_config.json
  for the ids of BOS and EOS.
  """

  def __init__(
    self,
    folder: str,
    *,
    chat_template: str = "",
    eos_token: str = "",
    template_date: str = DEFAULT_DATE,
  ):
    """Reads the tokenizer.

    Args:
      folder: of the tokenizer.
      chat_template: path of a jinja file to use instead of the folder's own.
      eos_token: spelling of the EOS, instead of what the folder says.
      template_date: YYYY-MM-DD, what a template's `strftime_now` says.

    Raises:
      FileNotFoundError: no tokenizer there.
      ValueError: no EOS token is named, or it is not in the vocabulary; or a
        date that is none.
    """
    root = epath.Path(folder)
    config, names, model, generation = (
      _read_json(root / f"{name}.json")
      for name in (
        "tokenizer_config",
        "special_tokens_map",
        "config",
        "generation_config",
      )
    )
    self.json = text = _read_tokenizer(root, config)
    self._with_specials, self._plain = _read_tokenizers(text)
    continuing = _without_beginnings(text)
    self._continuing = (
      (self._with_specials, self._plain)
      if continuing is None
      else _read_tokenizers(continuing)
    )
    # Not the number of tokens: a vocabulary may have holes.
    self.vocab_size = 1 + max(self._plain.get_vocab().values())
    self._special = {
      key: _token_text(config.get(key) or names[key])
      for key in _SPECIAL_TOKENS
      if config.get(key) or names.get(key)
    }
    self._fill_special("bos", model, generation)
    self._fill_special("eos", model, generation)
    if eos_token:
      self._special["eos_token"] = eos_token
    elif "eos_token" not in self._special and (root / "merges.txt").exists():
      # Whose own class knows it without being told.
      self._special["eos_token"] = "<|endoftext|>"
    self.eos_id = self._find_eos(folder)
    pad = self._special.get("pad_token")
    self.pad_id = self._plain.token_to_id(pad) if pad else None
    self._generation_stops = _ids(generation.get("eos_token_id"))
    self.bos_id = self._find_bos(folder, config)
    self.chat_template = _find_template(root, config, chat_template)
    self.has_chat_template = self.chat_template is not None
    self._template = ChatTemplate(
      self.chat_template or "", self._special, date=_parse_date(template_date)
    )
    decisive = [text, self._special, self.bos_id, self.chat_template]
    if self.has_chat_template:
      decisive += [self._generation_stops, template_date]
    self.digest = _digest(decisive)
    self.parts = {"vocabulary": _digest(decisive[:3])}
    if self.has_chat_template:
      self.parts["chat_template"] = _digest(decisive[3:])

  @property
  def vocab(self) -> dict[str, int]:
    """Ids by token, added tokens included."""
    return self._plain.get_vocab()

  @property
  def special_tokens(self) -> dict[str, str]:
    """Spelling of `bos_token`, `eos_token` and the like, where there is one."""
    return dict(self._special)

  def _fill_special(self, name: str, *configs: Mapping[str, Any]) -> None:
    """Names a token that only a model's config knows, by its id."""
    if f"{name}_token" in self._special:
      return
    for config in configs:
      for i in _ids(config.get(f"{name}_token_id"))[:1]:
        token = self._plain.id_to_token(i)
        if token is not None:
          self._special[f"{name}_token"] = token
          return

  def _find_eos(self, folder: str) -> int:
    name = self._special.get("eos_token")
    eos_id = self._plain.token_to_id(name) if name else None
    if eos_id is None:
      raise ValueError(
        f"{folder}: no EOS token ({name!r}). Responses must end with one: name"
        " it as data.eos_token, or as eos_token in tokenizer_config.json"
      )
    return eos_id

  def _find_bos(self, folder: str, config: Mapping[str, Any]) -> int | None:
    """Returns the BOS that the steps of tokenizer.json put before a text.

    `add_bos_token` beside a tokenizer.json adds nothing, as in transformers 5.
    """
    name = self._special.get("bos_token")
    bos_id = self._plain.token_to_id(name) if name else None
    if bos_id is None:
      return None
    ids = self._plain.encode("a", add_special_tokens=True).ids
    if ids and ids[0] == bos_id:
      return bos_id
    if config.get("add_bos_token"):
      _LOG.warning(
        "%s: tokenizer_config.json says add_bos_token, and no step of"
        " tokenizer.json puts a BOS before a text: none is put, as in"
        " transformers",
        folder,
      )
    return None

  @functools.cached_property
  def stop_ids(self) -> tuple[int, ...]:
    """Ids that end a response: EOS, the model's others, the template's own.

    A checkpoint may name several (generation_config.json), and a template may
    end a turn with a token that none of its files calls an EOS.
    """
    known = (i for i in self._generation_stops if i < self.vocab_size)
    turn_end = self._find_turn_end()
    return tuple(dict.fromkeys([self.eos_id, *known, *turn_end]))

  def _find_turn_end(self) -> list[int]:
    """The special token that the template puts behind an answer, if any."""
    if not self.has_chat_template:
      return []
    asked = {"role": "user", "content": "a"}
    answer = {"role": "assistant", "content": "b"}
    try:
      text = self.render([asked, answer], False)
    except RecordError:
      return []  # what it refuses of real records will be told there
    ids = self.encode([text], is_rendered=True, is_continuation=False)[0]
    added = self._plain.get_added_tokens_decoder()
    for i in reversed(ids):
      if i in added and added[i].special:
        return [i]
      if self._plain.decode([i]).strip():
        return []
    return []

  def encode(
    self, texts: Sequence[str], *, is_rendered: bool, is_continuation: bool
  ) -> list[list[int]]:
    with_specials, plain = (
      self._continuing
      if is_continuation
      else (self._with_specials, self._plain)
    )
    encodings = (with_specials if is_rendered else plain).encode_batch(
      list(texts), add_special_tokens=False
    )
    return [encoding.ids for encoding in encodings]

  def decode(self, ids: Sequence[int]) -> str:
    return self._plain.decode(list(ids), skip_special_tokens=True)

  def render(
    self,
    messages: Sequence[Message],
    header: bool,
    extras: Mapping[str, Any] | None = None,
  ) -> str:
    """Renders messages in a sandbox of its own process.

    Raises:
      RecordError: the template refuses these messages, or takes more than
        `templates.Caps`.
    """
    [text] = self.render_batch([Request(messages, header, extras or {})])
    if isinstance(text, RecordError):
      raise text
    return text

  def render_batch(
    self, requests: Sequence[Request]
  ) -> list[str | RecordError]:
    return self._template.render(requests)


def _digest(value: Any) -> str:
  text = json.dumps(value, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _read_json(path: epath.Path) -> dict[str, Any]:
  return json.loads(path.read_text()) if path.exists() else {}


def _ids(value: Any) -> list[int]:
  """Ids of a config that may name none, one or several."""
  if value is None:
    return []
  return list(value) if isinstance(value, list) else [value]


def _parse_date(date: str) -> datetime.date:
  try:
    return datetime.date.fromisoformat(date)
  except ValueError as error:
    raise ValueError(
      f"data.template_date={date!r} must be a day as YYYY-MM-DD"
    ) from error


def _read_tokenizer(root: epath.Path, config: Mapping[str, Any]) -> str:
  """The tokenizer.json of a folder, added tokens of other files included."""
  path = root / "tokenizer.json"
  is_pair = not path.exists()
  if not is_pair:
    text = path.read_text()
  elif (root / "vocab.json").exists() and (root / "merges.txt").exists():
    text = _byte_level(root, config).to_str()
  else:
    raise FileNotFoundError(
      f"{path} does not exist; a tokenizer is a folder with tokenizer.json, or"
      " with vocab.json and merges.txt, or 'bytes'"
    )
  added = {
    int(i): tokenizers.AddedToken(
      **{k: v for k, v in token.items() if k != "__type"}
    )
    for i, token in config.get("added_tokens_decoder", {}).items()
  }
  for token, i in _read_json(root / "added_tokens.json").items():
    added.setdefault(i, tokenizers.AddedToken(token, special=True))
  whole = tokenizers.Tokenizer.from_str(text)
  missing = [
    i for i in sorted(added) if whole.token_to_id(added[i].content) is None
  ]
  for i in missing:
    whole.add_tokens([added[i]])
    if whole.token_to_id(added[i].content) != i:
      raise ValueError(
        f"{root}: the added token {added[i].content!r} has the id {i} in its"
        f" files, and the next free one is"
        f" {whole.token_to_id(added[i].content)}"
      )
  if is_pair and config.get("add_bos_token"):
    # Here the key counts: there is no tokenizer.json with steps of its own.
    _put_bos(whole, _token_text(config.get("bos_token") or "<|endoftext|>"))
    return whole.to_str()
  return whole.to_str() if missing else text


def _put_bos(tokenizer: tokenizers.Tokenizer, bos: str) -> None:
  """Makes a BOS before every text one of a tokenizer's steps."""
  bos_id = tokenizer.token_to_id(bos)
  if bos_id is not None:
    tokenizer.post_processor = processors.TemplateProcessing(
      single=f"{bos} $A", special_tokens=[(bos, bos_id)]
    )


def _byte_level(
  root: epath.Path, config: Mapping[str, Any]
) -> tokenizers.Tokenizer:
  """GPT-2's byte-level BPE, from its two files."""
  vocab = _read_json(root / "vocab.json")
  lines = (root / "merges.txt").read_text().split("\n")
  merges = [
    tuple(line.split(" "))
    for line in lines
    if line.strip() and not line.startswith("#version")
  ]
  tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
    add_prefix_space=bool(config.get("add_prefix_space"))
  )
  tokenizer.decoder = decoders.ByteLevel()
  if "<|endoftext|>" in vocab:
    tokenizer.add_special_tokens(["<|endoftext|>"])
  return tokenizer


def _read_tokenizers(
  text: str,
) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]:
  """Two of a tokenizer.json: special tokens are meant, or are letters."""
  pair = (
    tokenizers.Tokenizer.from_str(text),
    tokenizers.Tokenizer.from_str(text),
  )
  pair[1].encode_special_tokens = True
  for one in pair:
    one.no_truncation()
    one.no_padding()
  return pair


def _without_beginnings(text: str) -> str | None:
  """The tokenizer.json for a text in the middle of a sequence.

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


def _token_text(value: Any) -> str:
  return value["content"] if isinstance(value, Mapping) else value


def _find_template(
  root: epath.Path, config: Mapping[str, Any], override: str
) -> str | None:
  if override:
    return epath.Path(override).read_text()
  if (root / "chat_template.jinja").exists():
    return (root / "chat_template.jinja").read_text()
  template = config.get("chat_template")
  if isinstance(template, list):  # several, by name
    by_name = {entry["name"]: entry["template"] for entry in template}
    return by_name.get("default")
  return template


def has_tokenizer(folder: epath.PathLike) -> bool:
  """Returns whether `HFTokenizer` can read a folder."""
  root = epath.Path(folder)
  pair = (root / "vocab.json").exists() and (root / "merges.txt").exists()
  return pair or (root / "tokenizer.json").exists()


def unread_file(folder: epath.PathLike) -> str:
  """Name of a tokenizer's file that is not read here, or ''."""
  root = epath.Path(folder)
  if not root.exists():
    return ""
  found = [path.name for name in _UNREAD_FILES for path in root.glob(name)]
  return found[0] if found else ""


def load_tokenizer(
  spec: str,
  *,
  chat_template: str = "",
  eos_token: str = "",
  template_date: str = DEFAULT_DATE,
) -> Tokenizer:
  """'bytes', 'letters:N', or the folder of a Hugging Face tokenizer.

  Args:
    spec: which.
    chat_template: path of a jinja file; "" for the folder's own.
    eos_token: spelling of the EOS; "" for the folder's own.
    template_date: YYYY-MM-DD, what a template's `strftime_now` says.
  """
  if spec == "bytes":
    if eos_token:
      raise ValueError(
        f"data.eos_token={eos_token!r} is for tokenizers with a vocabulary;"
        " that of 'bytes' is its id 257"
      )
    return ByteTokenizer()
  kind, _, count = spec.partition(":")
  if kind == "letters" and count.isdecimal():
    return LetterTokenizer(int(count))
  return HFTokenizer(
    spec,
    chat_template=chat_template,
    eos_token=eos_token,
    template_date=template_date,
  )
