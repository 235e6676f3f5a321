"""Reads tokenizer.json, and tokens that other files of its folder add."""

from collections.abc import Collection, Mapping, Sequence
import functools
import json
from typing import Any

from etils import epath
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from dpo_jax.data.spellings import Spellings
from dpo_jax.system import files


class Encoder:
  """Tokenizer of a tokenizer.json.

  Attributes:
    plain: the tokenizer; special tokens in a text are letters to it.
    spellings: its special tokens.
  """

  def __init__(self, text: str):
    self._text = text
    self.plain, self._with_specials = _build(text), _build(text)
    self.plain.encode_special_tokens = True

  def name_special(self, named: Collection[str]) -> None:
    """Makes those added tokens special that a config names, such as EOS."""
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
    ids = [
      one.ids
      for one in tokenizer.encode_batch(list(texts), add_special_tokens=False)
    ]
    if is_rendered:
      for i, text in enumerate(texts):
        if self.spellings.is_hidden_in(text):
          ids[i] = self._encode_hidden(text)
    return ids

  def _encode_hidden(self, text: str) -> list[int]:
    """Encodes a text with special tokens, of which some are letters.

    The template's own tokens become marks, which are tokens of the same kind,
    and all spellings in the text are letters.
    """
    tokenizer, own = self._marked
    text = self.spellings.mark(text)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return [own.get(i, i) for i in ids]

  @functools.cached_property
  def _marked(self) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
    """Tokenizer that knows marks, and the ids that they stand for."""
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
  """Makes a token that strips the spaces around it as another does."""
  return tokenizers.AddedToken(
    content,
    lstrip=token.lstrip,
    rstrip=token.rstrip,
    single_word=token.single_word,
    normalized=False,
    special=special,
  )


def read_json(path: epath.Path) -> dict[str, Any]:
  return json.loads(path.read_text()) if path.exists() else {}


def read_tokenizer(root: epath.Path, config: Mapping[str, Any]) -> str:
  """Returns tokenizer.json, added tokens of other files included."""
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
  for token, i in read_json(root / "added_tokens.json").items():
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
    # Without a tokenizer.json, whose steps would decide, the key counts.
    _put_bos(whole, token_text(config.get("bos_token") or "<|endoftext|>"))
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
  vocab = read_json(root / "vocab.json")
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


def token_text(value: Any) -> str:
  return value["content"] if isinstance(value, Mapping) else value


def find_template(
  root: epath.Path, config: Mapping[str, Any], override: str
) -> str | None:
  """Returns the chat template of a tokenizer's folder.

  Args:
    root: folder.
    config: its tokenizer_config.json.
    override: path of a jinja file to use instead; "" for none.
  """
  if override:
    return files.existing(override).read_text()
  if (root / "chat_template.jinja").exists():
    return (root / "chat_template.jinja").read_text()
  template = config.get("chat_template")
  if isinstance(template, list):  # several, by name
    by_name = {entry["name"]: entry["template"] for entry in template}
    return by_name.get("default")
  return template
