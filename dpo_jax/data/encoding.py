"""Encodes prompts and responses as token ids, with their BOS and EOS."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from dpo_jax.data.dialogues import Example
from dpo_jax.data.messages import Message
from dpo_jax.data.tokenizers import Tokenizer


class Response(NamedTuple):
  """A response.

  Attributes:
    ids: token ids, EOS included unless it was cut off.
    scored: a byte for each id, 1 if it is scored.
  """

  ids: list[int]
  scored: bytes

  def first(self, count: int) -> "Response":
    return Response(self.ids[:count], self.scored[:count])


def encode(
  examples: list[Example], tokenizer: Tokenizer, reads_tokens: bool
) -> list[tuple[list[int], list[Response]]]:
  """Encodes prompts, with their BOS, and responses, with their EOS.

  A truncated response gets no EOS. A response of several turns is encoded turn
  by turn, as its turns would be sampled: no token straddles their border.

  Args:
    examples: texts.
    tokenizer: encodes texts.
    reads_tokens: whether a special token that is written out in plain text,
      such as '</s>', is encoded as that token and not as ordinary characters.
      In rendered text it is, unless it is hidden.

  Returns:
    For each example, ids of the prompt, and its responses.
  """
  encoded: list[Any] = [None] * len(examples)
  for is_rendered in (False, True):
    chosen = [i for i, e in enumerate(examples) if e.is_rendered == is_rendered]
    has_tokens = is_rendered or reads_tokens
    prompts = tokenizer.encode(
      [examples[i].prompt for i in chosen],
      is_rendered=has_tokens,
      is_continuation=False,
    )
    pieces = [_pieces(examples[i]) for i in chosen]
    ids = iter(
      tokenizer.encode(
        [text for group in pieces for parts in group for text, _ in parts],
        is_rendered=has_tokens,
        is_continuation=True,
      )
    )
    for i, prompt, group in zip(chosen, prompts, pieces, strict=True):
      truncated = examples[i].truncated or [False] * len(group)
      responses = []
      for parts, is_cut in zip(group, truncated, strict=True):
        found = [(next(ids), flag) for _, flag in parts]
        responses.append(_join(found, tokenizer, has_tokens, not is_cut))
      encoded[i] = _with_bos(prompt, tokenizer), responses
  return encoded


def _pieces(example: Example) -> list[list[tuple[str, bool]]]:
  """Returns for each response its pieces: a text, and whether it is scored."""
  if example.scored is None:
    return [[(text, True)] for text in example.responses]
  found = []
  for text, ranges in zip(example.responses, example.scored, strict=True):
    parts, at = [], 0
    for start, end in ranges:
      parts += [(text[at:start], False), (text[start:end], True)]
      at = end
    found.append([part for part in parts if any(part)])
  return found


def _join(
  parts: list[tuple[list[int], bool]],
  tokenizer: Tokenizer,
  has_tokens: bool,
  is_whole: bool,
) -> Response:
  """Joins the pieces of a response, so that the last has one end.

  A chat template may have ended a turn already, and may have written a line
  break after it, which a policy never samples: after the last turn it is left
  out, after an earlier one it is not scored.

  Args:
    parts: ids of the pieces, and whether they are scored.
    tokenizer: its EOS ends a last piece without an end.
    has_tokens: whether the ids may hold special tokens.
    is_whole: whether the last piece ends; otherwise its sampler cut it off, and
      an end that a template wrote is left out.
  """
  ids, scored = [], b""
  for j, (piece, is_scored) in enumerate(parts):
    is_last = j + 1 == len(parts)
    end = _find_end(piece, tokenizer) if has_tokens else None
    if is_last and is_whole:
      piece = [*piece, tokenizer.eos_id] if end is None else piece[:end]
    elif is_last and end is not None:  # by a template that ends every turn
      piece = piece[: end - 1]
    length = len(piece) if end is None or is_last else end
    ids += piece
    scored += bytes([is_scored]) * length
    scored += bytes(len(piece) - length)
  return Response(ids, scored)


def _find_end(ids: list[int], tokenizer: Tokenizer) -> int | None:
  """Finds the end of a turn: a stop id that is not followed by text.

  Returns:
    Number of ids up to and including the stop id; None without one.
  """
  for i, token in enumerate(ids):
    if token in tokenizer.stop_ids and not tokenizer.decode(ids[i:]).strip():
      return i + 1
  return None


def encode_prompt(
  prompt: str | Sequence[Message], tokenizer: Tokenizer
) -> list[int]:
  """Encodes one prompt as those of the data are.

  Args:
    prompt: text; or messages, which the chat template renders.
    tokenizer: encodes texts.

  Returns:
    Token ids, with BOS and the header of an answer where the data have them.

  Raises:
    RecordError: messages that the template refuses, or no template.
  """
  if isinstance(prompt, str):
    text = prompt
  else:
    hidden = tokenizer.spellings.hide(list(prompt), "the prompt")
    text = tokenizer.render(hidden, True)
  [ids] = tokenizer.encode(
    [text], is_rendered=text is not prompt, is_continuation=False
  )
  return _with_bos(ids, tokenizer)


def _with_bos(prompt: list[int], tokenizer: Tokenizer) -> list[int]:
  if tokenizer.bos_id is None or prompt[:1] == [tokenizer.bos_id]:
    return prompt
  return [tokenizer.bos_id, *prompt]
