"""Shapes of published preference data, rewritten into one of six formats."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

from dpo_jax.data.messages import (
  RecordError,
  Unusable,
  as_turns,
  is_messages,
)
from dpo_jax.system import files

Record = Mapping[str, Any]

# The formats, by the columns that they need. Field names are TRL's.
FORMATS: dict[str, frozenset[str]] = {
  "pair": frozenset({"prompt", "chosen", "rejected"}),
  "transcripts": frozenset({"chosen", "rejected"}),
  "unpaired": frozenset({"prompt", "completion", "label"}),
  "ranking": frozenset({"prompt", "responses", "scores"}),
  "demonstration": frozenset({"prompt", "completion"}),
  "conversation": frozenset({"messages"}),
}
# Columns that any record may have.
OPTIONAL = frozenset(
  {
    *("system", "tools", "chat_template_kwargs", "truncated"),
    *("score_chosen", "score_rejected", "margin"),
  }
)
_SHAREGPT_ROLES = {
  "human": "user",
  "gpt": "assistant",
  "observation": "tool",
}


@dataclasses.dataclass(frozen=True)
class Shape:
  """Columns of published data, and how they become those of a format.

  Attributes:
    needs: columns that identify it.
    reads: further columns that it reads where they are there. Those of
      OPTIONAL are always read.
    rewrite: the columns -> those of a format. Its errors lack the address.
    is_chat: whether a text prompt is a user's turn, so that it becomes a
      message where the tokenizer has a chat template.
    roles: role in the data -> ours.
    same: column in which neighbouring records agree that are one group.
  """

  needs: frozenset[str]
  reads: frozenset[str] = frozenset()
  rewrite: Callable[[Record], Record] = dict
  is_chat: bool = False
  roles: Mapping[str, str] = dataclasses.field(default_factory=dict)
  same: str = ""


def _pair(
  first: Any, second: Any, winner: int | None, strength: float = 1
) -> dict[str, Any]:
  """Returns the columns of a pair: chosen, rejected and their scores.

  Args:
    first: response 0.
    second: response 1.
    winner: index of the chosen one; None for a tie, whose scores are both 0.
    strength: score of the chosen one; the rejected one has 0.
  """
  chosen, rejected = (second, first) if winner == 1 else (first, second)
  return {
    "chosen": chosen,
    "rejected": rejected,
    "score_chosen": 0 if winner is None else strength,
    "score_rejected": 0,
  }


def _choose(record: Record, name: str, allowed: Mapping[Any, Any]) -> Any:
  value = record[name]
  if isinstance(value, bool | int | float | str) and value in allowed:
    return allowed[value]
  raise RecordError(
    f"{name}={value!r:.80} must be one of {', '.join(map(str, allowed))}"
  )


def _list(value: Any, name: str) -> list[Any]:
  """Reads a list, or JSON text of one.

  Raises:
    RecordError: anything that is neither; names the column `name`.
  """
  if isinstance(value, str):
    try:
      value = files.parse_json(value)
    except ValueError as error:
      raise RecordError(f"{name} is not JSON: {error}") from error
  if not is_messages(value):
    raise RecordError(f"{name} must be a list, and is {type(value).__name__}")
  return list(value)


def _conversation(record: Record) -> Record:
  return {**record, "messages": _list(record["messages"], "messages")}


def _orca(record: Record, name: str = "question") -> Record:
  answers = {key: record[key] for key in ("chosen", "rejected")}
  return {**answers, "prompt": record[name]}


def _argilla(record: Record) -> Record:
  return _orca(record, "input")


def _alpaca(record: Record) -> Record:
  """Returns the columns prompt, chosen and rejected.

  The prompt is instruction and input on lines of their own, as in
  LLaMA-Factory. With a history it is messages: earlier turns, then that text.
  """
  prompt = record["instruction"]
  if record.get("input"):
    prompt = f"{prompt}\n{record['input']}"
  if record.get("history"):
    turns = [
      {"role": role, "content": text}
      for exchange in _list(record["history"], "history")
      for role, text in zip(("user", "assistant"), exchange, strict=True)
    ]
    prompt = [*turns, {"role": "user", "content": prompt}]
  answers = {key: record[key] for key in ("chosen", "rejected")}
  return {**answers, "prompt": prompt}


def _sharegpt(record: Record) -> Record:
  conversation = [
    _from_value(m) for m in _list(record["conversations"], "conversations")
  ]
  if "chosen" not in record:
    return {"messages": conversation}
  answers = {
    key: record[key]
    if isinstance(record[key], str)
    else [_from_value(m) for m in _list(as_turns(record[key]), key)]
    for key in ("chosen", "rejected")
  }
  return {**answers, "prompt": conversation}


def _from_value(message: Any) -> Any:
  """Converts a message with `from` and `value` to role and content.

  Anything without `from` is returned as it is.
  """
  if not isinstance(message, Mapping) or "from" not in message:
    return message
  rest = {k: v for k, v in message.items() if k not in ("from", "value")}
  return {"role": message["from"], "content": message.get("value"), **rest}


_MARK = "<extra_id_1>"


def _helpsteer2(record: Record) -> Record:
  """Returns the columns prompt, responses and scores, by helpfulness.

  The record holds lists over the responses to one prompt. A prompt of several
  turns becomes messages.

  Raises:
    Unusable: a single response.
  """
  first, *turns = record["prompt"][0].split(f"\n{_MARK}")
  prompt = first
  if turns:
    prompt = [{"role": "user", "content": first}]
    for turn in turns:
      role, _, content = turn.partition("\n")
      prompt.append({"role": role.lower(), "content": content})
  if len(record["response"]) == 1:
    raise Unusable("single_response")
  return {
    "prompt": prompt,
    "responses": record["response"],
    "scores": record["helpfulness"],
  }


def _helpsteer3(record: Record) -> Record:
  """Returns a pair: below 0 the first response is better, above 0 the second.

  The score of the better one is the absolute value of `overall_preference`; at
  0 the two are tied, with scores of 0.
  """
  allowed = {i: i for i in range(-3, 4)}
  preference = _choose(record, "overall_preference", allowed)
  winner = None if preference == 0 else int(preference > 0)
  answers = record["response1"], record["response2"]
  return {
    "prompt": _list(record["context"], "context"),
    **_pair(*answers, winner, abs(preference)),
  }


def _shp(record: Record) -> Record:
  winner = _choose(record, "labels", {1: 0, 0: 1})
  answers = record["human_ref_A"], record["human_ref_B"]
  return {"prompt": record["history"], **_pair(*answers, winner)}


_WINNERS = {
  "model_a": 0,
  "model_b": 1,
  "tie": None,
  "tie (bothbad)": None,
  "both_bad": None,
}


def _arena(record: Record) -> Record:
  first, second = (
    _list(record[name], name) for name in ("conversation_a", "conversation_b")
  )
  return _pair(first, second, _choose(record, "winner", _WINNERS))


def _arena_text(record: Record) -> Record:
  winner = _choose(record, "winner", _WINNERS)
  answers = record["response_a"], record["response_b"]
  return {"prompt": record["prompt"], **_pair(*answers, winner)}


def _arena_turns(record: Record) -> Record:
  """Returns a pair of responses to one prompt, or of whole conversations.

  The columns prompt, response_a and response_b are lists of turns, as JSON
  text. With one turn each, the result is prompt and two texts; otherwise chosen
  and rejected are messages, prompt included.

  Raises:
    RecordError: two winners, or lists of different length.
  """
  flags = [
    _choose(record, f"winner_{who}", {1: True, 0: False})
    for who in ("model_a", "model_b")
  ]
  if all(flags):
    raise RecordError("winner_model_a and winner_model_b are both 1")
  winner = flags.index(True) if any(flags) else None
  prompts = _list(record["prompt"], "prompt")
  both: list[list[dict[str, Any]]] = []
  for name in ("response_a", "response_b"):
    answers = _list(record[name], name)
    if len(answers) != len(prompts) or not prompts:
      raise RecordError(
        f"{name} has {len(answers)} turns, and prompt {len(prompts)}"
      )
    turns = [
      {"role": role, "content": text or ""}
      for exchange in zip(prompts, answers, strict=True)
      for role, text in zip(("user", "assistant"), exchange, strict=True)
    ]
    both.append(turns)
  if len(prompts) == 1:
    one, other = (turns[1]["content"] for turns in both)
    return {**_pair(one, other, winner), "prompt": prompts[0] or ""}
  one, other = both
  return _pair(one, other, winner)


def _summaries(record: Record) -> Record:
  """Returns a pair of summaries; prompts are written as in arXiv:2009.01325.

  The prompt is a post with subreddit and title, or an article.

  Raises:
    RecordError: neither of them, or another choice than 0 or 1.
  """
  info, summaries = record["info"], _list(record["summaries"], "summaries")
  winner = _choose(record, "choice", {0: 0, 1: 1})
  if info.get("post"):
    heads = (("SUBREDDIT: r/", "subreddit"), ("TITLE: ", "title"))
    lines = [f"{head}{info[key]}" for head, key in heads if info.get(key)]
    prompt = "\n\n".join([*lines, f"POST: {info['post']}", "TL;DR:"])
  elif info.get("article"):
    prompt = f"Article:\n{info['article']}\n\nTL;DR:"
  else:
    raise RecordError("info has neither a post nor an article")
  one, other = (" " + summary["text"].strip() for summary in summaries)
  return {"prompt": prompt, **_pair(one, other, winner)}


def _needs(*names: str) -> frozenset[str]:
  return frozenset(names)


# The first whose columns are there is taken.
SHAPES: dict[str, Shape] = {
  "sharegpt": Shape(
    _needs("conversations", "chosen", "rejected"),
    rewrite=_sharegpt,
    roles=_SHAREGPT_ROLES,
  ),
  "helpsteer3": Shape(
    _needs("context", "response1", "response2", "overall_preference"),
    rewrite=_helpsteer3,
  ),
  "shp": Shape(
    _needs("history", "human_ref_A", "human_ref_B", "labels"),
    rewrite=_shp,
    is_chat=True,
  ),
  "arena": Shape(
    _needs("conversation_a", "conversation_b", "winner"), rewrite=_arena
  ),
  "arena_turns": Shape(
    _needs(
      *("prompt", "response_a", "response_b"),
      *("winner_model_a", "winner_model_b"),
    ),
    rewrite=_arena_turns,
    is_chat=True,
  ),
  "arena_text": Shape(
    _needs("prompt", "response_a", "response_b", "winner"),
    rewrite=_arena_text,
    is_chat=True,
  ),
  "summaries": Shape(_needs("info", "summaries", "choice"), rewrite=_summaries),
  "helpsteer2": Shape(
    _needs("prompt", "response", "helpfulness"),
    rewrite=_helpsteer2,
    is_chat=True,
    same="prompt",
  ),
  "pair": Shape(FORMATS["pair"]),
  "orca": Shape(
    _needs("question", "chosen", "rejected"), rewrite=_orca, is_chat=True
  ),
  "alpaca": Shape(
    _needs("instruction", "chosen", "rejected"),
    reads=_needs("input", "history"),
    rewrite=_alpaca,
    is_chat=True,
  ),
  "argilla": Shape(
    _needs("input", "chosen", "rejected"), rewrite=_argilla, is_chat=True
  ),
  "transcripts": Shape(FORMATS["transcripts"]),
  "unpaired": Shape(FORMATS["unpaired"]),
  "ranking": Shape(FORMATS["ranking"]),
  "demonstration": Shape(FORMATS["demonstration"]),
  "conversation": Shape(FORMATS["conversation"], rewrite=_conversation),
  "sharegpt_conversation": Shape(
    _needs("conversations"), rewrite=_sharegpt, roles=_SHAREGPT_ROLES
  ),
}
