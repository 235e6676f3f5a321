"""Special tokens that messages spell are letters under any chat template.

A chat template writes special tokens by their spelling, and puts messages
between them. In its text a message's "</s>" looks like the template's own. So
before it renders, each special token that a message spells is hidden: one
private-use character stands for it. A template may trim, slice, split or
compare a message, and cannot cut such a character or add to it. In its text
every spelling is then the template's own, and is a token; what was hidden is
letters again when the text is encoded.

Marks around whole messages would show more, but templates trim messages and
look at how they begin. A second rendering, to compare with, would follow other
branches of the template. A template that looks for a special token in messages
does not find it. "<think>" and the like are not hidden unless they are special
tokens.
"""

from collections.abc import Collection, Mapping, Sequence
import re
from typing import Any

from dpo_jax.data.messages import RecordError

# The characters count down from here; fonts assign private ones from below.
_TOP = 0x10FFFD


class Spellings:
  """The special tokens of a tokenizer, and characters that stand for them.

  Attributes:
    tokens: spellings of the special tokens, longest first.
    marks: token -> character that `mark` writes for it.
  """

  def __init__(self, tokens: Sequence[str]):
    """Assigns two characters to each token, and one to each beginning.

    Args:
      tokens: spelling of each special token.
    """
    self.tokens = _longest_first(set(tokens))
    # A message that ends with "</" must not become "</s>" by what follows it.
    beginnings = _longest_first(
      {t[:i] for t in self.tokens for i in range(1, len(t))} - set(self.tokens)
    )
    hidden = [*self.tokens, *beginnings]
    self._hidden = {text: chr(_TOP - i) for i, text in enumerate(hidden)}
    self.marks = {
      token: chr(_TOP - len(hidden) - i) for i, token in enumerate(self.tokens)
    }
    self._letters = {ord(sign): text for text, sign in self._hidden.items()}
    self._token = _any_of(self.tokens)
    self._ending = _any_of(self.tokens, beginnings)
    self._is_hidden = _range(0, len(hidden))
    self._is_hidden_token = _range(0, len(self.tokens))
    self._is_private = _range(0, len(hidden) + len(self.tokens))

  def hide(self, value: Any, where: str) -> Any:
    """Hides what strings spell, at every depth of messages.

    Args:
      value: value that JSON can hold.
      where: file and line, for errors.

    Returns:
      The same, with a private-use character for each special token, and for
      the beginning of one at the end of a string.

    Raises:
      RecordError: a string holds such a character.
    """
    if isinstance(value, str):
      if found := self._is_private.search(value):
        raise RecordError(
          f"{where}: a message holds the private-use character"
          f" U+{ord(found[0]):06X}, which stands for a special token that is"
          " spelled: replace it, or set data.special_tokens='read'"
        )
      return self._ending.sub(lambda match: self._hidden[match[0]], value)
    if isinstance(value, Mapping):
      return {
        self.hide(k, where): self.hide(v, where) for k, v in value.items()
      }
    if isinstance(value, Sequence):
      return [self.hide(item, where) for item in value]
    return value

  def is_hidden_in(self, text: str) -> bool:
    """Returns whether rendered text holds a character that `hide` wrote."""
    return self._is_hidden.search(text) is not None

  def is_spelled_in(self, text: str, *, is_rendered: bool) -> bool:
    """Returns whether a text spells a special token.

    Args:
      text: text.
      is_rendered: whether a chat template wrote it. Then only tokens that
        `hide` hid in messages count, not the template's own.
    """
    pattern = self._is_hidden_token if is_rendered else self._token
    return pattern.search(text) is not None

  def mark(self, text: str) -> str:
    """Marks the template's special tokens in rendered text.

    Each becomes its private-use character in `marks`. Each spelling that `hide`
    hid becomes letters again.
    """
    marked = self._token.sub(lambda match: self.marks[match[0]], text)
    return marked.translate(self._letters)


def _longest_first(texts: Collection[str]) -> list[str]:
  return sorted(texts, key=lambda text: (-len(text), text))


def _any_of(
  texts: Sequence[str], endings: Sequence[str] = ()
) -> re.Pattern[str]:
  """Returns a pattern of some texts anywhere, and of others at the end only.

  Args:
    texts: texts, longest first; the first that fits is matched. Without one,
      the pattern matches nothing.
    endings: texts that match only at the end of a string.
  """
  if not texts:
    return re.compile("(?!)")
  # The look ahead spares most positions the list.
  starts = "".join(sorted({re.escape(text[0]) for text in texts}))
  choices = [re.escape(text) for text in texts]
  choices += [rf"{re.escape(text)}\Z" for text in endings]
  return re.compile(f"(?=[{starts}])(?:{'|'.join(choices)})")


def _range(first: int, end: int) -> re.Pattern[str]:
  """Returns a pattern of the private-use characters `first` to `end` - 1.

  They count down from _TOP. Where there are none, it matches nothing.
  """
  if first == end:
    return re.compile("(?!)")
  return re.compile(f"[{chr(_TOP - end + 1)}-{chr(_TOP - first)}]")
