"""Shapes of published data, and columns that no shape may leave out."""

from collections import Counter
import json
import sys

from absl import flags
from ml_collections import config_flags
import pytest

from dpo_jax.data import formats
from dpo_jax.data.examples import Example, parse_record, parse_records
from dpo_jax.data.messages import RecordError, Unusable
from dpo_jax.data.reading import Reading, Seen, shape_records
from dpo_jax.data.tokenizers import HFTokenizer
from dpo_jax.records.workdir import Workdir
from dpo_jax.training.setup import build_run
from tests import tiny
from tests.data import folders

ASK = "Name a colour."
QUESTION = {"role": "user", "content": ASK}
SYSTEM = {"role": "system", "content": "Be brief."}


def answer(text):
  return {"role": "assistant", "content": text}


def whole(text, *before):
  return [*before, QUESTION, answer(text)]


def from_value(who, text):
  return {"from": who, "value": text}


RENDERED = f"<s><|user|>{ASK}<|assistant|>"
WITH_SYSTEM = f"<s><|system|>Be brief.<|user|>{ASK}<|assistant|>"
RED, MUD = "Red.</s>\n", "Mud.</s>\n"


def rendered(prompt=RENDERED, score=(1.0, 0.0), responses=(RED, MUD)):
  return Example(prompt, responses, score, is_rendered=True)


SIDES = {"chosen": "Red.", "rejected": "Mud."}
CONVERSATIONS = {"chosen": whole("Red."), "rejected": whole("Mud.")}
IDS = {"id": "a-1", "source": "web", "chosen_model": "m"}
# Data set (and shape) -> a record as it is published, and its example.
PUBLISHED = {
  "hh-rlhf (transcripts)": (
    {
      "chosen": f"\n\nHuman: {ASK}\n\nAssistant: Red.",
      "rejected": f"\n\nHuman: {ASK}\n\nAssistant: Mud.",
    },
    Example(f"\n\nHuman: {ASK}\n\nAssistant:", (" Red.", " Mud."), (1.0, 0.0)),
  ),
  "ultrafeedback_binarized (pair)": (
    {
      **IDS,
      "prompt": ASK,
      **CONVERSATIONS,
      "messages": whole("Red."),
      "score_chosen": 8.0,
      "score_rejected": 4.5,
    },
    rendered(score=(8.0, 4.5)),
  ),
  "tulu-3 (pair)": ({**IDS, "prompt": ASK, **CONVERSATIONS}, rendered()),
  "orpo-dpo-mix (pair)": (
    {**IDS, "prompt": ASK, "question": "What colour?", **CONVERSATIONS},
    rendered(),
  ),
  "Intel orca (orca)": (
    {"system": "Be brief.", "question": ASK, **SIDES},
    rendered(WITH_SYSTEM),
  ),
  "argilla orca (argilla)": (
    {"system": "", "input": ASK, **SIDES, "rating": [9, 2], "status": "tie"},
    rendered(),
  ),
  "kto-mix (unpaired)": (
    {"prompt": [QUESTION], "completion": [answer("Mud.")], "label": False},
    rendered(score=(0.0,), responses=(MUD,)),
  ),
  "argilla kto-mix (unpaired)": (
    {"prompt": ASK, "completion": whole("Red."), "label": True, "rating": 5.0},
    rendered(score=(1.0,), responses=(RED,)),
  ),
  "HelpSteer3 (helpsteer3)": (
    {
      "domain": "general",
      "language": "english",
      "context": [QUESTION],
      "response1": "Red.",
      "response2": "Mud.",
      "overall_preference": -2,
    },
    rendered(score=(2.0, 0.0)),
  ),
  "SHP (shp)": (
    {
      **{"post_id": "p", "history": ASK, "score_A": 3, "score_B": 9},
      **{"human_ref_A": "Mud.", "human_ref_B": "Red.", "labels": 0},
    },
    rendered(),
  ),
  "chatbot arena (arena)": (
    {
      **{"model_a": "m", "model_b": "n", "winner": "model_b"},
      "conversation_a": whole("Mud."),
      "conversation_b": whole("Red."),
    },
    rendered(),
  ),
  "arena 55k (arena_turns)": (
    {
      "prompt": json.dumps([ASK]),
      "response_a": json.dumps(["Red."]),
      "response_b": json.dumps(["Mud."]),
      **{"winner_model_a": 0, "winner_model_b": 0, "winner_tie": 1},
    },
    rendered(score=(0.0, 0.0)),
  ),
  "WSDM arena (arena_text)": (
    {
      **{"prompt": ASK, "response_a": "Mud.", "response_b": "Red."},
      "winner": "model_b",
    },
    rendered(),
  ),
  "summarize_from_feedback (summaries)": (
    {
      "info": {"id": "i", "post": "I ate.", "title": "T", "subreddit": "food"},
      "summaries": [{"text": " Mud.", "policy": "p"}, {"text": " Red."}],
      "choice": 1,
      "extra": {"confidence": None},
    },
    Example(
      "SUBREDDIT: r/food\n\nTITLE: T\n\nPOST: I ate.\n\nTL;DR:",
      (" Red.", " Mud."),
      (1.0, 0.0),
    ),
  ),
  "LLaMA-Factory sharegpt (sharegpt)": (
    {
      "conversations": [from_value("human", ASK)],
      "chosen": from_value("gpt", "Red."),
      "rejected": from_value("gpt", "Mud."),
      "system": "Be brief.",
    },
    rendered(WITH_SYSTEM),
  ),
  "LLaMA-Factory alpaca (alpaca)": (
    {"instruction": "Name", "input": "a colour.", **SIDES},
    rendered(RENDERED.replace(ASK, "Name\na colour.")),
  ),
  "sharegpt demonstrations (sharegpt_conversation)": (
    {"conversations": [from_value("human", ASK), from_value("gpt", "Red.")]},
    rendered(score=(1.0,), responses=(RED,)),
  ),
}


@pytest.fixture(scope="module")
def render(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tokenizer")
  return HFTokenizer(folders.write_folder(folder)).render_batch


def parse(record, render=None, **reading):
  return parse_record(record, "data.jsonl:7", render, Reading(**reading))


def parse_all(records, render=None, scored_turns="last"):
  """Reads all records; returns them with the notes and counts."""
  seen, counts = Seen(), Counter()
  numbered = [(f"data.jsonl:{i + 1}", r) for i, r in enumerate(records)]
  shaped = shape_records(numbered, Reading(), seen)
  found = list(parse_records(shaped, render, scored_turns, counts))
  return found, seen, counts


def test_every_published_shape_has_a_record():
  tested = {name.rpartition("(")[2][:-1] for name in PUBLISHED}
  rest = {"helpsteer2", "ranking", "demonstration", "conversation"}
  assert tested | rest == formats.SHAPES.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_record_is_read_as_it_is(name, render):
  record, expected = PUBLISHED[name]
  [found], seen, _ = parse_all([record], render)
  assert found == expected
  assert list(seen.shapes) == [name.rpartition("(")[2][:-1]]
  shape = formats.SHAPES[next(iter(seen.shapes))]
  read = shape.needs | shape.reads | formats.OPTIONAL
  assert seen.unread == record.keys() - read


@pytest.mark.parametrize(
  "prompt", [ASK, f"Hi.\n<extra_id_1>Assistant\nYes?\n<extra_id_1>User\n{ASK}"]
)
def test_neighbouring_rows_of_one_prompt_are_one_ranking(render, prompt):
  def row(text, helpfulness, asked=prompt):
    rest = {"helpfulness": helpfulness, "verbosity": 1}
    return {"prompt": asked, "response": text, **rest}

  records = [row("Mud.", 1), row("Red.", 4), row("a", 1, "other"), row("b", 2)]
  found, seen, _ = parse_all(records, render)
  assert found[0].responses == (RED, MUD)
  assert found[0].score == (4.0, 1.0)
  before = "<|user|>Hi.<|assistant|>Yes?</s>\n" * (prompt != ASK)
  assert found[0].prompt == f"<s>{before}<|user|>{ASK}<|assistant|>"
  # Not neighbours, though the last has the first one's prompt again.
  assert [f.reason for f in found[1:]] == ["single_response"] * 2
  assert (seen.records, seen.shapes) == (4, {"helpsteer2": 4})


@pytest.mark.parametrize(
  ("name", "change", "score"),
  [
    ("HelpSteer3 (helpsteer3)", {"overall_preference": 3}, (3.0, 0.0)),
    ("HelpSteer3 (helpsteer3)", {"overall_preference": 0}, (0.0, 0.0)),
    ("chatbot arena (arena)", {"winner": "tie (bothbad)"}, (0.0, 0.0)),
    ("chatbot arena (arena)", {"winner": "model_a"}, (1.0, 0.0)),
    ("SHP (shp)", {"labels": 1}, (1.0, 0.0)),
    ("arena 55k (arena_turns)", {"winner_model_b": 1}, (1.0, 0.0)),
  ],
)
def test_the_other_winner_is_chosen(name, change, score, render):
  record, before = PUBLISHED[name]
  found = parse(record | change, render)
  assert found.score == score
  swapped = before.responses[::-1]
  is_tie = score == (0.0, 0.0)
  same_order = is_tie and name != "chatbot arena (arena)"
  assert found.responses == (before.responses if same_order else swapped)


def test_arena_turns_of_several_exchanges_are_conversations(render):
  record = {
    "prompt": json.dumps(["Hi.", ASK]),
    "response_a": json.dumps(["Yes?", "Mud."]),
    "response_b": ["Yes?", "Red."],
    **{"winner_model_a": 0, "winner_model_b": 1},
  }
  assert parse(record, render) == rendered(
    f"<s><|user|>Hi.<|assistant|>Yes?</s>\n<|user|>{ASK}<|assistant|>"
  )


def test_alpaca_history_is_the_turns_before(render):
  record = {"instruction": ASK, **SIDES, "history": [["Hi.", "Yes?"]]}
  assert parse(record, render).prompt == (
    f"<s><|user|>Hi.<|assistant|>Yes?</s>\n<|user|>{ASK}<|assistant|>"
  )


def test_turns_without_a_chat_template_are_plain_text():
  for columns in ({"question": ASK}, {"instruction": ASK}, {"input": ASK}):
    for system in ({}, {"system": ""}, {"system": None}):
      found = parse({**columns, **SIDES, **system})
      assert found == Example(ASK, ("Red.", "Mud."), (1.0, 0.0))


@pytest.mark.parametrize(
  ("record", "message"),
  [
    (
      {**PUBLISHED["HelpSteer3 (helpsteer3)"][0], "overall_preference": 4},
      "overall_preference=4 must be one of -3, ",
    ),
    ({**PUBLISHED["SHP (shp)"][0], "labels": None}, "labels=None must be"),
    (
      {**PUBLISHED["chatbot arena (arena)"][0], "winner": "model_c"},
      "winner='model_c' must be one of model_a, model_b, tie",
    ),
    (
      {**PUBLISHED["arena 55k (arena_turns)"][0], "response_a": '["a", "b"]'},
      "response_a has 2 turns, and prompt 1",
    ),
    (
      {**PUBLISHED["arena 55k (arena_turns)"][0], "prompt": "[broken"},
      "prompt is not JSON",
    ),
    (
      {**PUBLISHED["summarize_from_feedback (summaries)"][0], "info": {}},
      "info has neither a post nor an article",
    ),
    (
      {**PUBLISHED["summarize_from_feedback (summaries)"][0], "summaries": 3},
      "summaries must be a list, and is int",
    ),
    (
      {**PUBLISHED["summarize_from_feedback (summaries)"][0], "info": "x"},
      "those of the format 'summaries', and do not hold",
    ),
    (
      {"prompt": 3, "response": "a", "helpfulness": 1},
      "those of the format 'helpsteer2', and do not hold",
    ),
    (
      {**SIDES, "conversations": [from_value("bot", "hi")]},
      "the role 'bot' is unknown; known roles are system, .*data.roles='bot=",
    ),
  ],
)
def test_columns_that_a_shape_cannot_read_are_named(record, message, render):
  with pytest.raises(RecordError, match=f"^data.jsonl:7: .*{message}"):
    parse(record, render)


# Names of columns and roles.


def test_columns_and_roles_have_the_names_that_the_config_gives_them(render):
  record = {"q": ASK, "good": "Red.", "bad": "Mud.", "rule": "Be brief."}
  columns = "prompt=q, chosen=good,rejected=bad,system=rule"
  assert parse(record, render, columns=columns) == rendered(WITH_SYSTEM)
  record = {
    "prompt": [{"role": "human", "content": ASK}],
    "chosen": [{"role": "bot", "content": "Red."}],
    "rejected": [{"role": "bot", "content": "Mud."}],
  }
  with pytest.raises(RecordError, match="the role 'human' is unknown"):
    parse(record, render)
  roles = "human=user,bot=assistant"
  assert parse(record, render, roles=roles) == rendered()


def test_renaming_to_an_existing_column_is_refused(render):
  record = {"prompt": "a", "question": ASK, "chosen": "b", "rejected": "c"}
  with pytest.raises(RecordError, match="another column the name 'prompt'"):
    parse(record, render, columns="prompt=question")


def test_unknown_roles_may_be_passed_to_the_template(render):
  ask = [{"role": "ipython", "content": ASK}]
  record = {"prompt": ask, "chosen": "Red.", "rejected": "Mud."}
  found = parse(record, render, roles="ipython=ipython")
  assert found.prompt == RENDERED.replace("user", "ipython")


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"columns": "promt=q"}, "no format has a column 'promt'.* 'prompt'"),
    ({"columns": "prompt"}, "data.columns='prompt' must be NAME=VALUE"),
    ({"columns": "prompt=a,prompt=b"}, "each name once"),
    ({"roles": "human"}, "data.roles='human' must be NAME=VALUE"),
    ({"format": "hh"}, "data.format='hh' must be one of .*transcripts"),
    ({"scored_turns": "first"}, "data.scored_turns='first' must be one of"),
    ({"special_tokens": "no"}, "data.special_tokens='no' must be one of let"),
  ],
)
def test_a_wrong_setting_says_what_is_allowed(settings, message):
  with pytest.raises(ValueError, match=message):
    Reading(**settings)


def test_error_for_a_missing_column_lists_the_columns():
  with pytest.raises(
    RecordError,
    match=r"^data.jsonl:7: data.columns names q, .*chosen, rejected",
  ):
    parse(SIDES, columns="prompt=q")
  with pytest.raises(
    RecordError, match=r"data.format='shp' needs the columns history, human_ref"
  ):
    parse(SIDES, format="shp")


def test_a_format_decides_where_columns_do_not():
  record = {"prompt": "p", "completion": "c", "label": False}
  assert parse(record, format="demonstration").score == (1.0,)
  record = {"prompt": "p", "input": ASK, **SIDES}
  assert parse(record, format="argilla", columns="prompt=").prompt == ASK


# Columns that carry input.


@pytest.mark.parametrize("system", ["", None])
@pytest.mark.parametrize("prompt", [ASK, [QUESTION]])
def test_a_system_text_is_a_message_and_an_empty_one_is_none(
  render, prompt, system
):
  record = {"prompt": prompt, **SIDES}
  with_system = parse({**record, "system": "Be brief."}, render)
  assert with_system == rendered(WITH_SYSTEM)
  # Rows of one table are read alike, whether they have a system text or not.
  assert parse({**record, "system": system}, render) == rendered()


@pytest.mark.parametrize(
  "record",
  [
    {"prompt": [SYSTEM, QUESTION], **SIDES},
    {"chosen": whole("Red.", SYSTEM), "rejected": whole("Mud.", SYSTEM)},
  ],
)
def test_repeated_system_text_is_added_once(record, render):
  assert parse({**record, "system": "Be brief."}, render).prompt == WITH_SYSTEM
  with pytest.raises(RecordError, match=r"column 'system' holds 'Be long.'"):
    parse({**record, "system": "Be long."}, render)


@pytest.mark.parametrize(
  ("record", "column"),
  [
    ({"prompt": ASK, **SIDES, "context": "a page"}, "context"),
    ({"prompt": [QUESTION], **SIDES, "history": [["a", "b"]]}, "history"),
    ({"prompt": ASK, **SIDES, "question": "which"}, "question"),
    ({**CONVERSATIONS, "images": ["x.png"]}, "images"),
    ({"messages": whole("Red."), "system_prompt": "s"}, "system_prompt"),
    ({"question": ASK, **SIDES, "input": "more"}, "input"),
  ],
)
def test_input_that_no_shape_reads_is_refused_by_name(record, column, render):
  message = f"column '{column}' holds input .*data.columns='{column}='"
  with pytest.raises(RecordError, match=message):
    parse(record, render)
  parse(record, render, columns=f"{column}=")
  # Empty, or in the prompt already, it changes nothing.
  for value in ("", None, [], " colour"):
    parse(record | {column: value}, render)


def test_a_system_text_without_a_template_is_refused():
  with pytest.raises(RecordError, match=r"'system' holds .*data\.columns='sys"):
    parse({"prompt": ASK, **SIDES, "system": "Be brief."})


# A prompt that stands in the responses too.


@pytest.mark.parametrize(
  ("record", "expected"),
  [
    (
      {"prompt": ASK, "chosen": f"{ASK} Red.", "rejected": f"{ASK} Mud."},
      Example(ASK, (" Red.", " Mud."), (1.0, 0.0)),
    ),
    ({"prompt": [QUESTION], **CONVERSATIONS}, rendered()),
    (
      {
        "prompt": [SYSTEM, QUESTION],
        "responses": [whole("Mud.", SYSTEM), whole("Red.", SYSTEM)],
        "scores": [0, 1],
      },
      rendered(WITH_SYSTEM),
    ),
  ],
)
def test_a_prompt_is_split_off_its_responses_and_counted(
  record, expected, render
):
  [found], _, counts = parse_all([record], render)
  assert found == expected
  assert counts["prompts_repeated"] == 1


@pytest.mark.parametrize(
  "record",
  [
    {"prompt": "Hi", "chosen": "Hi there", "rejected": "Hi you"},
    {"prompt": ASK, "chosen": f"{ASK} Red.", "rejected": "Mud."},
  ],
)
def test_responses_that_resemble_the_prompt_stay_whole(record):
  [found], _, counts = parse_all([record])
  assert found.responses == (record["chosen"], record["rejected"])
  assert not counts["prompts_repeated"]


def test_a_text_prompt_before_answers_alone_is_the_user_s_turn(render):
  record = {
    "prompt": ASK,
    "chosen": [answer("Red.")],
    "rejected": answer("Mud."),
  }
  assert parse(record, render) == rendered()


def test_a_conversation_about_something_else_is_dropped(render):
  with pytest.raises(Unusable) as caught:
    parse({"prompt": "Name a fruit.", **CONVERSATIONS}, render)
  assert caught.value.reason == "prompts_differ"


@pytest.mark.parametrize("prompt", ["Hi.", ASK])
def test_of_several_turns_the_prompt_may_name_the_first_or_last(prompt, render):
  before = [{"role": "user", "content": "Hi."}, answer("Yes?")]
  record = {
    "prompt": prompt,
    "chosen": whole("Red.", *before),
    "rejected": whole("Mud.", *before),
  }
  assert parse(record, render).responses == (RED, MUD)


# Messages.


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ([{"type": "image", "url": "x"}], "content part of the type 'image'"),
    ([{"type": "text"}], "content part of the type 'text'"),
    (["text"], "content part of the type <class 'str'>"),
  ],
)
def test_content_that_is_not_text_is_refused_by_type(content, message, render):
  record = {"prompt": [{"role": "user", "content": content}], **SIDES}
  with pytest.raises(RecordError, match=f"^data.jsonl:7: .*{message}"):
    parse(record, render)


def test_content_parts_of_text_are_joined(render):
  parts = [{"type": "text", "text": t, "image": None} for t in ("Name", " a")]
  parts.append({"type": "text", "text": " colour."})
  record = {"prompt": [{"role": "user", "content": parts}], **SIDES}
  assert parse(record, render) == rendered()


def test_nulls_that_a_table_fills_in_are_dropped_at_every_depth(tmp_path):
  template = (
    "{{ tools | tojson }}{% for m in messages %}{{ m | tojson }}{% endfor %}"
  )
  folder = folders.write_folder(tmp_path, chat_template=template)
  render = HFTokenizer(folder).render_batch

  def record(fill):
    call = {"name": "go", "arguments": {"x": 3, **fill}, **fill}
    made = {"role": "assistant", "content": None, "tool_calls": [call], **fill}
    properties = {"x": {"type": "integer", **fill}, **fill}
    tools = [{"name": "go", "parameters": {"properties": properties}}]
    asked = {**QUESTION, **fill}
    return {"prompt": [asked], "completion": [made], "tools": tools}

  clean = parse(record({}), render)
  assert parse(record({"text": None}), render) == clean
  assert '"content": null' in clean.responses[0]
  # JSON text has the nulls that its writer meant.
  text = record({})
  text["tools"] = json.dumps(record({"text": None})["tools"])
  assert '"text": null' in parse(text, render).prompt
  calls = json.dumps(text["completion"][0]["tool_calls"])
  text["completion"][0]["tool_calls"] = calls
  assert parse(text, render).responses == clean.responses


def test_a_record_that_is_nested_too_deeply_is_named(render):
  value = []
  for _ in range(5000):
    value = [value]
  call = {"role": "assistant", "content": None, "tool_calls": value}
  with pytest.raises(RecordError, match=r"^data.jsonl:7: .*nested too deeply"):
    parse({"prompt": [QUESTION], "completion": [call]}, render)


@pytest.mark.parametrize("name", ["hh-rlhf (transcripts)", "tulu-3 (pair)"])
def test_null_prompt_equals_no_prompt(name, render):
  """As a table fills it in where the prompt is in both transcripts."""
  record, expected = PUBLISHED[name]
  assert parse({**record, "prompt": None, "input": None}, render) == expected


def test_a_message_with_nothing_but_a_weight_is_refused(render):
  record = {"prompt": [QUESTION], **SIDES}
  record["rejected"] = [{"role": "assistant", "content": None, "weight": 1}]
  with pytest.raises(RecordError, match="must have 'role' and 'content'"):
    parse(record, render)


# The config.


def test_the_config_decides_how_records_are_read(tmp_path, monkeypatch):
  rows = [{"ask": f"Name {i}.", **SIDES} for i in range(40)]
  path = tmp_path / "rows.jsonl"
  path.write_text("".join(json.dumps(r) + "\n" for r in [*rows, SIDES]))
  argv = [
    "train",
    f"--config.data.source=jsonl:{path}",
    "--config.data.columns=prompt=ask,system=",
    "--config.data.max_broken_records=1",
  ]
  monkeypatch.setattr(sys, "argv", argv)
  config, values = tiny.make_config(), flags.FlagValues()
  config_flags.DEFINE_config_dict("config", config, flag_values=values)
  values(argv)
  run = build_run(config, Workdir.at(tmp_path / "run"))
  report = run.data.train.store.report
  assert (report["groups"], report["broken"]) == (40, 1)
