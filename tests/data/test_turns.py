"""Which turns of a conversation are scored, from record to batch."""

import dataclasses
import json

import numpy as np
import pytest

from dpo_jax.data import batch_plan, loader, mismatched, store
from dpo_jax.data.examples import RecordError, parse_record
from dpo_jax.data.reading import Reading
from dpo_jax.data.tokenizers import HFTokenizer
from tests.data.folders import CHATML, write_folder
from tests.data.test_store import Listed


def user(text):
  return {"role": "user", "content": text}


def answer(text):
  return {"role": "assistant", "content": text}


CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "the"}]}
FOUND = {"role": "tool", "content": "cat"}
# Pairs of several turns: what is scored is set in brackets below.
TALK = {
  "prompt": [user("hi"), answer("yes"), user("why")],
  "chosen": [CALL, FOUND, answer("so")],
  "rejected": [answer("no"), user("oh"), answer("well")],
}


@pytest.fixture
def tokenizer(tmp_path):
  folder = tmp_path / "tokenizer"
  return HFTokenizer(write_folder(folder, chat_template=CHATML))


def build(records, tmp_path, tokenizer, scored_turns, limits=(200, 100)):
  return store.build_store(
    Listed(records, digest=json.dumps(records)),
    tokenizer,
    store.Limits(*limits),
    str(tmp_path / "stores"),
    Reading(scored_turns=scored_turns),
  )


def spell(opened, index, tokenizer):
  """A group's parts as text, with brackets around what is scored."""
  spelled = []
  prompt, *responses = opened.group(index)
  masks = [np.zeros(len(prompt), bool), *opened.masks(index)]
  for part, mask in zip((prompt, *responses), masks, strict=True):
    text, before = "", False
    for i, flag in zip(part.tolist(), mask.tolist(), strict=True):
      text += "[" * (flag and not before) + "]" * (before and not flag)
      text += tokenizer._plain.decode([i], False)
      before = flag
    spelled.append(text + "]" * bool(before))
  return spelled


def test_the_last_turn_of_a_response_is_scored(tmp_path, tokenizer):
  opened = build([TALK], tmp_path, tokenizer, "last")
  assert spell(opened, 0, tokenizer) == [
    "<s><|user|>hi</s>\n<|assistant|>yes</s>\n<|user|>why</s>\n<|assistant|>",
    "@the</s>\n<|tool|>cat</s>\n<|assistant|>[so</s>]",
    "no</s>\n<|user|>oh</s>\n<|assistant|>[well</s>]",
  ]


def test_all_assistant_turns_of_a_response_are_scored(tmp_path, tokenizer):
  """With their ends, and without line breaks that are never sampled."""
  opened = build([TALK], tmp_path, tokenizer, "all")
  assert spell(opened, 0, tokenizer) == [
    "<s><|user|>hi</s>\n<|assistant|>yes</s>\n<|user|>why</s>\n<|assistant|>",
    "[@the</s>]\n<|tool|>cat</s>\n<|assistant|>[so</s>]",
    "[no</s>]\n<|user|>oh</s>\n<|assistant|>[well</s>]",
  ]


@pytest.mark.parametrize(
  "record",
  [
    {"prompt": [*TALK["prompt"]], "completion": TALK["chosen"]},
    {"messages": [*TALK["prompt"], *TALK["chosen"]]},
    {"messages": [*TALK["prompt"], *TALK["chosen"], user("thanks")]},
  ],
)
def test_all_of_a_demonstration_is_scored(tmp_path, tokenizer, record):
  opened = build([record], tmp_path, tokenizer, "all")
  assert spell(opened, 0, tokenizer) == [
    "<s><|user|>hi</s>\n<|assistant|>",
    "[yes</s>]\n<|user|>why</s>\n<|assistant|>[@the</s>]\n"
    "<|tool|>cat</s>\n<|assistant|>[so</s>]",
  ]
  opened = build([record], tmp_path, tokenizer, "last")
  last = spell(opened, 0, tokenizer)[-1]
  # Where a record has no prompt column its prompt is all but the last turn.
  before = "@the</s>\n<|tool|>cat</s>\n<|assistant|>"
  assert last == before * ("prompt" in record) + "[so</s>]"


def test_feedback_on_one_response_does_not_score_its_prompt(
  tmp_path, tokenizer
):
  record = {
    "prompt": TALK["prompt"],
    "completion": [answer("so")],
    "label": False,
  }
  opened = build([record], tmp_path, tokenizer, "all")
  assert spell(opened, 0, tokenizer)[1] == "[so</s>]"


def test_transcripts_split_at_the_first_difference(tmp_path, tokenizer):
  shared = [user("hi"), answer("yes"), user("why")]
  record = {
    "chosen": [*shared, answer("so"), user("oh"), answer("well")],
    "rejected": [*shared, answer("no"), user("oh"), answer("dog")],
  }
  opened = build([record], tmp_path, tokenizer, "all")
  assert spell(opened, 0, tokenizer)[1:] == [
    "[so</s>]\n<|user|>oh</s>\n<|assistant|>[well</s>]",
    "[no</s>]\n<|user|>oh</s>\n<|assistant|>[dog</s>]",
  ]
  # The last turns do not follow one prompt, nor do a user's answers.
  with pytest.raises(ValueError, match="'prompts_differ': 1"):
    build([record], tmp_path, tokenizer, "last")
  other = {k: [user(k), answer("so")] for k in ("chosen", "rejected")}
  with pytest.raises(ValueError, match="'prompts_differ': 1"):
    build([other], tmp_path, tokenizer, "all")


def test_single_turns_need_no_mask(tmp_path, tokenizer):
  record = {**TALK, "chosen": [answer("so")], "rejected": [answer("no")]}
  parts = []
  for scored_turns in ("last", "all"):
    opened = build([record], tmp_path, tokenizer, scored_turns)
    assert opened.scored is None
    np.testing.assert_array_equal(opened.num_scored, opened.lengths[:, 1:])
    parts.append((spell(opened, 0, tokenizer), opened.digest))
  assert parts[0][0] == parts[1][0]
  assert parts[0][1] != parts[1][1]


def test_a_response_without_a_scored_turn_that_fits_is_dropped(
  tmp_path, tokenizer
):
  long = {
    "prompt": [user("hi")],
    "completion": [CALL, {**FOUND, "content": "cat " * 60}, answer("so")],
    "label": True,
  }
  opened = build([long, TALK], tmp_path, tokenizer, "last", (50, 30))
  assert opened.report["dropped"] == {"no_scored_turn_fits": 1}
  # Its call fits, and is scored where all turns are.
  opened = build([long, TALK], tmp_path, tokenizer, "all", (50, 30))
  assert opened.report["dropped"] == {}
  assert (
    opened.num_scored[0, 0]
    == len(
      tokenizer.encode(["@the"], is_rendered=True, is_continuation=True)[0]
    )
    + 1
  )


def test_counts_of_scored_tokens_follow_every_view(tmp_path, tokenizer):
  single = {"prompt": [user("hi")], "completion": [answer("so")]}
  ranked = {
    "prompt": [user("a")],
    "responses": [TALK["chosen"], TALK["rejected"]],
    "scores": [1, 2],
  }
  opened = build([TALK, single, ranked], tmp_path, tokenizer, "last")
  pairs = build([TALK, ranked], tmp_path, tokenizer, "all")
  for view in (
    opened,
    opened.first_slots(1),
    pairs.split_pairs(),
    mismatched.add_slot(pairs.split_pairs(), seed=0, max_tokens=200),
    mismatched.add_slot(pairs, seed=0, max_tokens=30),
  ):
    counts = [[m.sum() for m in view.masks(i)] for i in range(len(view))]
    np.testing.assert_array_equal(view.num_scored, counts)
    assert view.num_scored.shape == view.score.shape
  assert (opened.num_scored < opened.lengths[:, 1:]).sum() == 4


def test_batch_scores_the_tokens_of_the_store(tmp_path, tokenizer):
  found = {**FOUND, "content": "the cat " * 20}
  chosen = [CALL, found, answer("so")]
  records = [
    {**TALK, "prompt": [user("hi " * n)], "chosen": chosen} for n in range(1, 6)
  ]
  opened = build(records, tmp_path, tokenizer, "all")

  def plan(view):
    return batch_plan.make_plan(
      view,
      np.arange(5),
      batch_size=3,
      row_tokens=0,
      row_multiple=1,
      layout="shared",
    )

  # Room for what is scored, and none for what is only read.
  planned = plan(opened)
  whole = plan(dataclasses.replace(opened, scored=None))
  assert planned.shapes[-1].row.num_tokens == whole.shapes[-1].row.num_tokens
  assert planned.shapes[-1].row.num_scored < whole.shapes[-1].row.num_scored
  batch = loader.Loader(opened, np.arange(5), planned, 3, seed=0).batch(0)
  assert (batch.example_ids >= 0).sum() == 3
  for r, g in np.argwhere(batch.example_ids >= 0):
    i = int(batch.example_ids[r, g])
    parts = zip(opened.group(i)[1:], opened.masks(i), strict=True)
    for k, (response, mask) in enumerate(parts):
      targets = batch.targets[r][batch.slots[r] == g * 2 + k]
      np.testing.assert_array_equal(targets, response[mask])


def test_an_unknown_choice_of_turns_is_refused(tmp_path, tokenizer):
  with pytest.raises(ValueError, match=r"scored_turns='first' must be one of"):
    build([TALK], tmp_path, tokenizer, "first")


def parse(record, tmp_path, template, scored_turns="all"):
  folder = write_folder(tmp_path / "tokenizer", chat_template=template)
  render = HFTokenizer(folder).render_batch
  reading = Reading(scored_turns=scored_turns)
  return parse_record(record, "data.jsonl:7", render, reading)


# Earlier thoughts are left out, as Qwen3 and others do it.
THINKING = CHATML.replace(
  "(m.content or '')",
  "(m.content if loop.last else m.content.split('</think>')[-1])",
)


def test_a_turn_that_is_written_differently_later_is_not_scored(tmp_path):
  record = {
    "messages": [
      user("hi"),
      answer("<think>well</think>yes"),
      user("why"),
      answer("<think>oh</think>so"),
    ]
  }
  with pytest.raises(RecordError) as caught:
    parse(record, tmp_path, THINKING)
  message = str(caught.value)
  assert message.startswith("data.jsonl:7: the chat template writes a turn")
  assert "alone: '<|user|>hi</s>\\n<|assistant|><think>well" in message
  assert "with what follows: '<|user|>hi</s>\\n<|assistant|>yes" in message
  assert "data.scored_turns='last'" in message
  # The last turn is written once, and is scored with its thoughts.
  example = parse(record, tmp_path, THINKING, "last")
  assert example.responses == ("<think>oh</think>so</s>\n",)


def test_a_header_that_opens_a_thought_needs_an_answer_with_one(tmp_path):
  """And a column can tell the template that there is none."""
  template = CHATML.replace("'<|assistant|>' }}", "H }}")
  template = (
    "{% set H = '<|assistant|>' if think is false else '<|assistant|><think>' "
    "%}" + template
  )
  record = {"prompt": [user("hi")], "completion": [answer("yes")]}
  with pytest.raises(RecordError, match="writes the prompt differently") as e:
    parse(record, tmp_path, template)
  assert "chat_template_kwargs" in str(e.value)
  thought = {**record, "completion": [answer("<think>oh</think>yes")]}
  assert parse(thought, tmp_path, template).responses == (
    "oh</think>yes</s>\n",
  )
  plain = {**record, "chat_template_kwargs": {"think": False}}
  assert parse(plain, tmp_path, template).responses == ("yes</s>\n",)


def test_tools_reach_the_template(tmp_path):
  template = "{{ tools | tojson }}" + CHATML
  tools = [{"type": "function", "function": {"name": "search"}}]
  record = {"prompt": [user("hi")], "completion": "yes"}
  expected = (
    '[{"type": "function", "function": {"name": "search"}}]'
    "<|user|>hi</s>\n<|assistant|>"
  )
  for column in (tools, '[{"type":"function","function":{"name":"search"}}]'):
    example = parse({**record, "tools": column}, tmp_path, template)
    assert example.prompt == expected
  for column in (None, [], ""):
    example = parse({**record, "tools": column}, tmp_path, template)
    assert example.prompt.startswith("null<|user|>")


@pytest.mark.parametrize(
  ("column", "message"),
  [
    ({"tools": "[{"}, "tools is not JSON"),
    ({"tools": {"name": "search"}}, "tools must be a list, and is dict"),
    ({"chat_template_kwargs": [1]}, "kwargs must be a dict, and is list"),
    (
      {"chat_template_kwargs": {"messages": []}},
      "chat_template_kwargs may not set messages",
    ),
    (
      {"completion": [answer("yes"), user("no")]},
      "last message of a response has the role 'user'",
    ),
    ({"messages": 3, "prompt": None}, "messages must be a list, and is int"),
  ],
)
def test_broken_columns_are_named(tmp_path, column, message):
  record = {"prompt": [user("hi")], "completion": "yes", **column}
  if "messages" in column:
    record = column
  with pytest.raises(RecordError, match=f"^data.jsonl:7: .*{message}"):
    parse(record, tmp_path, CHATML)


def test_keys_that_a_table_fills_with_null_are_absent(tmp_path):
  template = (
    "{% for m in messages %}{{ m.role }}:{{ 'tool_calls' in m }}"
    "{{ m.content is none }};{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
  )
  record = {
    "prompt": [{**user("hi"), "tool_calls": None, "name": None}],
    "completion": [CALL],
  }
  example = parse(record, tmp_path, template)
  assert example.prompt == "user:FalseFalse;assistant:"
  assert example.responses == ("TrueTrue;",)
