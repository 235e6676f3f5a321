"""Records of every format, and what a broken one is told."""

import dataclasses

import pytest

from dpo_jax.data.examples import (
  Example,
  RecordError,
  Unusable,
  parse_record,
)
from dpo_jax.data.formats import FORMATS
from dpo_jax.data.tokenizers import HFTokenizer
from tests.data import folders

USER = {"role": "user", "content": "hi"}
YES = {"role": "assistant", "content": "yes"}
NO = {"role": "assistant", "content": "no"}


def parse(record, render=None):
  return parse_record(record, "data.jsonl:7", render)


@pytest.fixture
def render(tmp_path):
  return HFTokenizer(folders.write_folder(tmp_path / "tokenizer")).render_batch


def render_with(tmp_path, template):
  folder = folders.write_folder(tmp_path / "tokenizer", chat_template=template)
  return HFTokenizer(folder).render_batch


# One record of each format, by FORMATS' names, and what it must become.
RECORDS = {
  "pair": (
    {"prompt": "p", "chosen": "c", "rejected": "r"},
    Example("p", ("c", "r"), (1.0, 0.0)),
  ),
  "transcripts": (
    {
      "chosen": "\n\nHuman: p\n\nAssistant: c",
      "rejected": "\n\nHuman: p\n\nAssistant: r",
    },
    Example("\n\nHuman: p\n\nAssistant:", (" c", " r"), (1.0, 0.0)),
  ),
  "unpaired": (
    {"prompt": "p", "completion": "c", "label": False},
    Example("p", ("c",), (0.0,)),
  ),
  "ranking": (
    {"prompt": "p", "responses": ["a", "b"], "scores": [1, 2]},
    Example("p", ("b", "a"), (2.0, 1.0)),
  ),
  "demonstration": (
    {"prompt": "p", "completion": "c"},
    Example("p", ("c",), (1.0,)),
  ),
  "conversation": (
    {"messages": [USER, YES]},
    Example(
      "<s><|user|>hi<|assistant|>", ("yes</s>\n",), (1.0,), is_rendered=True
    ),
  ),
}


def test_there_is_a_record_of_every_format():
  assert RECORDS.keys() == FORMATS.keys()


@pytest.mark.parametrize("kind", RECORDS)
def test_every_format_is_read(kind, render):
  record, expected = RECORDS[kind]
  assert parse(record, render) == expected


@pytest.mark.parametrize("kind", RECORDS)
def test_columns_that_no_format_knows_change_nothing(kind, render):
  record, expected = RECORDS[kind]
  assert parse({"id": 3, "source": "web", **record}, render) == expected


@pytest.mark.parametrize(
  ("label", "score"), [(True, 1.0), (False, 0.0), (1, 1.0), (0, 0.0)]
)
def test_a_label_is_a_score_of_one_or_zero(label, score):
  record = {"prompt": "p", "completion": "c", "label": label}
  assert parse(record).score == (score,)


@pytest.mark.parametrize("kind", ["pair", "transcripts"])
def test_scores_of_a_pair_are_kept_and_its_order_too(kind):
  record, example = RECORDS[kind]
  scores = {"score_chosen": -0.5, "score_rejected": 3}
  assert parse(record | scores) == dataclasses.replace(
    example, score=(-0.5, 3.0)
  )


@pytest.mark.parametrize(
  ("columns", "score"),
  [
    ({"margin": 1.5}, (1.5, 0.0)),
    ({"margin": 0}, (1e-6, 0.0)),
    ({"margin": None}, (1.0, 0.0)),
    ({"margin": 9, "score_chosen": 3, "score_rejected": 1}, (3.0, 1.0)),
  ],
  ids=str,
)
def test_a_margin_is_a_gap_in_score(columns, score):
  record, example = RECORDS["pair"]
  assert parse(record | columns) == dataclasses.replace(example, score=score)


def test_a_ranking_is_sorted_best_first_and_ties_keep_their_order():
  record = {
    "prompt": "p",
    "responses": ["a", "b", "c", "d", "e"],
    "scores": [0.0, 2.5, -1.0, 2.5, 7],
  }
  example = parse(record)
  assert example.responses == ("e", "b", "d", "a", "c")
  assert example.score == (7.0, 2.5, 2.5, 0.0, -1.0)


def test_a_transcript_splits_at_the_last_assistant_turn():
  opening = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
  example = parse({"chosen": opening + " Sure, x", "rejected": opening + " S"})
  assert example.prompt == opening
  # The opening that both answers share stays theirs.
  assert example.responses == (" Sure, x", " S")


@pytest.mark.fault(13)
def test_a_response_that_begins_as_the_other_stays_whole():
  opening = "\n\nHuman: a\n\nAssistant:"
  example = parse({"chosen": opening + " yes", "rejected": opening + " yes!"})
  assert example.responses == (" yes", " yes!")


@pytest.mark.parametrize(
  ("record", "reason"),
  [
    (
      {
        "chosen": "\n\nHuman: a\n\nAssistant: x",
        "rejected": "\n\nHuman: b\n\nAssistant: x",
      },
      "prompts_differ",
    ),
    (
      {"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "x"},
      "prompts_differ",
    ),
    ({"chosen": [USER, YES], "rejected": [YES, NO]}, "prompts_differ"),
    ({"chosen": [USER, USER, YES], "rejected": [USER, NO]}, "prompts_differ"),
    ({"chosen": [], "rejected": [USER, NO]}, "empty_response"),
    ({"chosen": [YES], "rejected": [NO]}, "empty_prompt"),
    ({"prompt": [], "completion": [YES]}, "empty_prompt"),
    ({"prompt": [USER], "completion": []}, "empty_response"),
    ({"prompt": [USER], "completion": " \n"}, "empty_response"),
    (
      {
        "prompt": [USER],
        "chosen": [YES],
        "rejected": [{"role": "assistant", "content": ""}],
      },
      "empty_response",
    ),
  ],
)
def test_unusable_records_have_a_reason(record, reason, render):
  with pytest.raises(Unusable) as caught:
    parse(record, render)
  assert caught.value.reason == reason


# Messages.


def test_messages_are_rendered_by_the_chat_template(render):
  example = parse({"prompt": [USER], "chosen": [YES], "rejected": [NO]}, render)
  assert example == Example(
    "<s><|user|>hi<|assistant|>",
    ("yes</s>\n", "no</s>\n"),
    (1.0, 0.0),
    is_rendered=True,
  )


@pytest.mark.parametrize(
  "record",
  [
    {"chosen": [USER, YES], "rejected": [USER, NO]},
    {"prompt": [USER], "chosen": "yes", "rejected": "no"},
    {"prompt": [USER], "responses": ["no", "yes"], "scores": [0, 1]},
    {"prompt": [USER], "responses": [[NO], [YES]], "scores": [0, 1]},
  ],
)
def test_spellings_of_the_same_dialogue_are_the_same_example(record, render):
  pair = {"prompt": [USER], "chosen": [YES], "rejected": [NO]}
  assert parse(record, render) == parse(pair, render)


def test_a_dialogue_of_several_turns_splits_at_the_last(render):
  turns = [
    {"role": "system", "content": "be brief"},
    USER,
    YES,
    {"role": "user", "content": "why"},
  ]
  example = parse({"chosen": [*turns, YES], "rejected": [*turns, NO]}, render)
  assert example.prompt == (
    "<s><|system|>be brief<|user|>hi<|assistant|>yes</s>\n"
    "<|user|>why<|assistant|>"
  )
  assert example.responses == ("yes</s>\n", "no</s>\n")


def test_unpaired_messages_keep_their_label(render):
  record = {"prompt": [USER], "completion": [YES], "label": False}
  example = parse(record, render)
  assert (example.responses, example.score) == (("yes</s>\n",), (0.0,))


def test_plain_text_is_not_marked_as_rendered(render):
  record, expected = RECORDS["pair"]
  assert parse(record, render) == expected
  assert not expected.is_rendered


# Broken records.


@pytest.mark.fault(16)
def test_misspelt_columns_are_named_with_the_nearest():
  with pytest.raises(RecordError) as caught:
    parse({"promt": "p", "chosen_": "c", "rejected": "r"})
  message = str(caught.value)
  assert message.startswith("data.jsonl:7: found the columns chosen_, promt,")
  assert "'promt' may be meant for 'prompt'" in message
  assert "'chosen_' may be meant for 'chosen'" in message
  assert "unpaired: completion, label, prompt" in message


@pytest.mark.parametrize("kind", RECORDS)
def test_a_missing_column_is_an_error_that_lists_what_is_there(kind):
  record, _ = RECORDS[kind]
  for name in record:
    rest = {k: v for k, v in record.items() if k != name}
    if any(need <= rest.keys() for need in FORMATS.values()):
      continue  # still a record of another format
    with pytest.raises(RecordError) as caught:
      parse(rest)
    assert (", ".join(sorted(rest)) or "none") in str(caught.value)


def test_a_record_without_columns_says_so():
  with pytest.raises(RecordError, match="found the columns none"):
    parse({})


@pytest.mark.fault(18)
@pytest.mark.parametrize(
  ("record", "message"),
  [
    ({"prompt": 3, "chosen": "c", "rejected": "r"}, "prompt .* is int"),
    (
      {"prompt": None, "chosen": "c", "rejected": "r"},
      "prompt column is missing",
    ),
    ({"prompt": "p", "chosen": None, "rejected": "r"}, "one is NoneType"),
    ({"prompt": "p", "chosen": "c", "rejected": [NO]}, "one is str"),
    ({"prompt": [USER], "chosen": [YES], "rejected": 5}, "one is int"),
    ({"chosen": "c", "rejected": [USER, NO]}, "are str and list"),
    ({"chosen": 1.5, "rejected": 2.5}, "are float and float"),
    ({"chosen": "Sure, a", "rejected": "Sure, b"}, "give the prompt a column"),
    ({"prompt": "p", "completion": "c", "label": "yes"}, "label='yes'"),
    ({"prompt": "p", "completion": "c", "label": 2}, "label=2"),
    ({"prompt": "p", "completion": "c", "label": None}, "label=None"),
    ({"prompt": "p", "responses": "ab", "scores": [1, 2]}, "must be lists"),
    ({"prompt": "p", "responses": [], "scores": []}, "must be lists"),
    ({"prompt": "p", "responses": ["a"], "scores": 1}, "must be lists"),
    (
      {"prompt": "p", "responses": ["a", "b"], "scores": [1]},
      "2 responses but 1 scores",
    ),
    (
      {"prompt": "p", "responses": ["a", "b"], "scores": [1, "2"]},
      "scores='2' must be a finite number",
    ),
    (
      {"prompt": "p", "responses": ["a"], "scores": [float("nan")]},
      "scores=nan",
    ),
    (
      {"prompt": "p", "responses": ["a", "b"], "scores": [1e39, 2.0]},
      "scores=1e[+]39 must be a finite number, and at most 3.40e[+]38",
    ),
    (
      {**RECORDS["pair"][0], "score_chosen": 10**400, "score_rejected": 0},
      "score_chosen=10* must be a finite number",
    ),
    ({**RECORDS["pair"][0], "margin": 1e39}, "margin=1e[+]39 must be"),
    (
      {"prompt": "p", "responses": ["a"], "scores": [True]},
      "scores=True",
    ),
    ({"prompt": "p", "responses": ["a", 4], "scores": [1, 2]}, "one is int"),
    (
      {**RECORDS["pair"][0], "score_chosen": 1.0, "score_rejected": None},
      "score_rejected=None",
    ),
    (
      {**RECORDS["pair"][0], "score_chosen": 1.0, "score_rejcted": 0.0},
      "score_chosen stands without the other",
    ),
    (
      {**RECORDS["pair"][0], "margin": -1},
      "margin=-1 must be at least 0: swap chosen and rejected",
    ),
    (
      {**RECORDS["pair"][0], "truncated": [True]},
      r"truncated=\[True\] must be a list of 2 booleans",
    ),
    (
      {**RECORDS["pair"][0], "truncated": [1, 0]},
      r"truncated=\[1, 0\] must be a list of 2 booleans",
    ),
    (
      {**RECORDS["pair"][0], "truncated": True},
      "truncated=True must be a list of 2 booleans",
    ),
    ({"prompt": "half \ud83d", "completion": "c"}, "not Unicode"),
    ({"prompt": "p", "completion": "half \ud83d"}, "not Unicode"),
  ],
)
def test_wrong_types_are_errors_that_name_the_line(record, message, render):
  with pytest.raises(RecordError, match=f"^data.jsonl:7: .*{message}"):
    parse(record, render)


def test_a_misspelt_prompt_column_is_named():
  with pytest.raises(RecordError, match="'promt' may be meant for 'prompt'"):
    parse({"promt": "p", "chosen": "c", "rejected": "r"})


@pytest.mark.parametrize(
  "message",
  [
    {"content": "hi"},
    {"role": "user"},
    {"role": "assistant", "content": None, "tool_calls": []},
    {"role": "tool", "content": None, "name": "search"},
    {"from": "human", "value": "hi"},
    "hi",
    None,
  ],
)
@pytest.mark.parametrize("place", ["prompt", "response"])
def test_a_message_without_role_or_content_is_shown(message, place, render):
  prompt, response = [USER], [YES]
  (prompt if place == "prompt" else response).insert(0, message)
  with pytest.raises(RecordError, match=r"^data.jsonl:7: a message must") as e:
    parse({"prompt": prompt, "completion": response}, render)
  assert repr(message) in str(e.value)


def test_messages_need_a_chat_template():
  with pytest.raises(RecordError, match=r"jsonl:7: .*data\.chat_template"):
    parse({"prompt": [USER], "completion": [YES]}, None)


@pytest.mark.fault(19)
def test_template_errors_name_the_line_and_the_roles(tmp_path):
  render = render_with(
    tmp_path, "{{ raise_exception('roles must alternate') }}"
  )
  with pytest.raises(RecordError) as caught:
    parse({"prompt": [USER, USER], "completion": [YES]}, render)
  message = str(caught.value)
  assert message.startswith("data.jsonl:7: ")
  assert "['user', 'user']" in message
  assert "roles must alternate" in message


@pytest.mark.fault(20)
def test_a_prompt_that_is_rendered_differently_before_an_answer_is_refused(
  tmp_path,
):
  """Thinking models open a thought in the header that answers do not have."""
  render = render_with(
    tmp_path,
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>' }}{% endif %}",
  )
  with pytest.raises(RecordError, match="writes the prompt differently") as e:
    parse({"prompt": [USER], "completion": [YES]}, render)
  message = str(e.value)
  assert message.startswith("data.jsonl:7: ")
  assert "<|assistant|><think>'" in message
  assert "<|assistant|>yes'" in message


def test_an_answer_of_the_user_is_refused(render):
  with pytest.raises(RecordError, match=r"^data.jsonl:7: .*differently"):
    parse({"prompt": [USER], "completion": [USER]}, render)
