"""An API judge asks each question once, and survives faults of its server."""

from concurrent import futures
import contextlib
import email.utils
import hashlib
import json
import logging
import math
import threading
import time

import pytest

from dpo_jax import judges
from dpo_jax.config import default_config
from dpo_jax.judges import api
from dpo_jax.judges.answers import Answers
from dpo_jax.judges.chat_server import ChatServer
from dpo_jax.system import files
from tests.judges import chat_stand_in as stand_in

KEY = "sk-test-0123456789"


def longer_wins(question):
  """Prefers the longer answer; the first of two that are as long."""
  first = question.split("<answer_a>\n")[1].split("\n</answer_a>")[0]
  second = question.split("<answer_b>\n")[1].split("\n</answer_b>")[0]
  return "A" if len(first) >= len(second) else "B"


@pytest.fixture
def server(monkeypatch):
  monkeypatch.setenv("OPENAI_API_KEY", KEY)
  with stand_in.serve(longer_wins) as served:
    yield served


@pytest.fixture
def settings(server, tmp_path):
  found = default_config().eval
  found.judge = "api:some/model"
  found.api.url = server.url
  found.api.cache_dir = str(tmp_path / "answers")
  found.api.num_parallel = 1
  found.api.timeout_s = 5.0
  return found


def make_judge(settings, waits=None):
  """A judge whose waits are noted and take no time."""
  waits = [] if waits is None else waits
  chat = ChatServer(
    "some/model", settings.api, sleep=waits.append, jitter=lambda: 1.0
  )
  return api.ApiJudge("some/model", settings, chat)


def kept(settings):
  with open(f"{settings.api.cache_dir}/some_model.jsonl") as file:
    return file.read()


def test_a_question_has_all_that_a_comparison_needs(server, settings):
  make_judge(settings).compare(["What?"], ["{second}"], ["No."])
  [(headers, body)] = server.requests
  assert headers["Authorization"] == f"Bearer {KEY}"
  assert body["model"] == "some/model"
  assert (body["temperature"], body["max_tokens"]) == (0, 64)
  [message] = body["messages"]
  filled = api.DEFAULT_PROMPT.replace("{prompt}", "What?")
  filled = filled.replace("{second}", "No.").replace("{first}", "{second}")
  assert message == {"role": "user", "content": filled}


def test_fields_of_a_request_are_added_replaced_and_left_out(
  server, settings, caplog
):
  make_judge(settings).compare(["p"], ["aa"], ["b"])
  settings.api.extra_body = (
    '{"temperature": null, "max_tokens": null, "max_completion_tokens": 4000}'
  )
  with caplog.at_level(logging.INFO, logger="dpo_jax"):
    make_judge(settings).compare(["p"], ["aa"], ["b"])  # another question
  assert "at most 4,000 out" in caplog.text
  make_judge(settings).compare(["p"], ["aa"], ["b"])
  (_, before), (_, after) = server.requests
  assert after == {
    "model": "some/model",
    "messages": before["messages"],
    "max_completion_tokens": 4000,
  }


@pytest.mark.parametrize("text", ["seed=1", "[1]", "null"])
def test_fields_that_are_not_an_object_are_refused(settings, text):
  settings.api.extra_body = text
  with pytest.raises(ValueError, match=r"extra_body='.*must be an object of"):
    judges.get_eval_judge(settings)


@pytest.mark.parametrize("text", ["Both are good, but", "A", None])
def test_an_answer_that_is_cut_is_left_out_and_not_kept(
  server, settings, caplog, text
):
  settings.api.max_left_out = 0.5
  server.script = [stand_in.completion(text, "length")]
  found = make_judge(settings).compare(["p", "q"], ["aa", "aa"], ["b", "b"])
  assert math.isnan(found[0]) and found[1] == 1.0
  assert "cut at 2 tokens (finish_reason is 'length')" in caplog.text
  assert "eval.api.max_tokens" in caplog.text
  assert len(kept(settings).splitlines()) == 1


def test_the_digest_of_a_question_is_that_of_older_versions(settings):
  make_judge(settings).compare(["p"], ["aa"], ["b"])
  shown = ["some/model", 64, api.DEFAULT_PROMPT, "p", "aa", "b"]
  digest = hashlib.sha256(json.dumps(shown).encode()).hexdigest()
  assert json.loads(kept(settings))["key"] == digest


def test_both_orders_and_their_bias_by_hand(server, settings):
  """The last two are as long: the first that is shown wins in both orders."""
  wins = judges.compare_in_both_orders(
    make_judge(settings),
    ["p", "p", "p", "p"],
    ["aaa", "a", "aa", "bb"],
    ["b", "bbb", "cc", "bb"],
  )
  assert wins.of_pairs.tolist() == [1.0, 0.0, 0.5, 0.5]
  found = wins.metrics()
  assert found["win_rate"] == 0.5
  assert found["order_bias"] == 0.25  # the last pair is equal, and not asked
  assert len(server.requests) == 6


@pytest.mark.parametrize(
  ("answer", "wanted"),
  [
    ("A", 1.0),
    ("B\n", 0.0),
    ("tie", 0.5),
    ("**Tie**.", 0.5),
    ("B is short.\nFinal answer: A", 1.0),
    ('"Answer B"', 0.0),
    ("**A**", 1.0),
    ("__B__", 0.0),
    ("answer_a", 1.0),
    ("<answer_b>", 0.0),
    ("\\boxed{A}", 1.0),
    ("$\\boxed{\\text{tie}}$", 0.5),
    ("Answer A is better.", 1.0),
    ("B is better", 0.0),
    ("The answer is A", 1.0),
    ("The better response is **B**.", 0.0),
    ("A or B", math.nan),
    ("A/B", math.nan),
    ("A, B", math.nan),
    ("neither", math.nan),
    ("Neither answer is better.", math.nan),
    ("Not A", math.nan),
    ("The worse answer is A", math.nan),
    ("Answer A is better than B or a tie", math.nan),
    ("Apples", math.nan),
    ("I cannot judge", math.nan),
    ("", math.nan),
    ("A\nbecause it is longer", math.nan),
  ],
)
def test_the_last_line_is_the_verdict(answer, wanted):
  assert api.parse_verdict(answer) == pytest.approx(wanted, nan_ok=True)


def test_no_question_is_asked_twice(server, settings):
  compare = make_judge(settings).compare
  assert compare(["p", "p"], ["aa", "aa"], ["b", "b"]) == [1.0, 1.0]
  assert len(server.requests) == 1
  assert compare(["p"], ["aa"], ["b"]) == [1.0]
  assert make_judge(settings).compare(["p"], ["aa"], ["b"]) == [1.0]
  assert len(server.requests) == 1
  assert make_judge(settings).compare(["p"], ["b"], ["aa"]) == [0.0]
  assert len(server.requests) == 2


def test_a_cut_answer_is_asked_again_and_the_others_are_kept(
  server, settings, caplog
):
  make_judge(settings).compare(["p"] * 3, ["aa", "b", "cc"], ["b", "aa", "d"])
  path = f"{settings.api.cache_dir}/some_model.jsonl"
  with open(path, "r+") as file:
    file.truncate(len(file.read()) - 5)
  for _ in range(2):
    found = make_judge(settings).compare(
      ["p"] * 3, ["aa", "b", "cc"], ["b", "aa", "d"]
    )
    assert found == [1.0, 0.0, 1.0]
  assert len(server.requests) == 4
  assert "skipped 1 damaged lines" in caplog.text


def test_another_template_or_length_is_another_question(
  server, settings, tmp_path
):
  make_judge(settings).compare(["p"], ["aa"], ["b"])
  path = tmp_path / "template.txt"
  path.write_text(f"Please. {api.DEFAULT_PROMPT}")
  settings.judge_prompt = str(path)
  make_judge(settings).compare(["p"], ["aa"], ["b"])
  settings.api.max_tokens = 8
  make_judge(settings).compare(["p"], ["aa"], ["b"])
  assert len(server.requests) == 3
  assert server.questions[1].startswith("Please. ")


def test_answers_of_many_threads_are_all_kept(server, settings):
  settings.api.num_parallel = 8
  prompts = [f"p{i}" for i in range(40)]
  firsts = ["aa" if i % 3 else "" for i in range(40)]
  found = make_judge(settings).compare(prompts, firsts, ["b"] * 40)
  assert found == [1.0 if i % 3 else 0.0 for i in range(40)]
  rows = [json.loads(line) for line in kept(settings).splitlines()]
  assert len({row["key"] for row in rows}) == 40
  assert {row["tokens_in"] for row in rows} == {100}


def test_threads_append_one_after_the_other(tmp_path, monkeypatch):
  inside, most = [], []

  @contextlib.contextmanager
  def naming(path, num_bytes):
    inside.append(path)
    time.sleep(0.002)
    most.append(len(inside))
    yield
    inside.pop()

  monkeypatch.setattr(files, "naming", naming)
  answers = Answers(str(tmp_path / "answers.jsonl"))
  with futures.ThreadPoolExecutor(8) as pool:
    list(pool.map(lambda i: answers.add(f"key{i}", "A"), range(16)))
  assert max(most) == 1


def test_an_error_ends_the_waits_of_other_threads(server, settings):
  settings.api.num_parallel = 2
  server.script = [
    stand_in.reply(429, "wait", Retry_After="300"),
    stand_in.reply(401, "no"),
  ]
  start = time.monotonic()
  with pytest.raises(judges.JudgeError, match="status 401"):
    judge = judges.get_eval_judge(settings)
    judge.compare(["p", "q"], ["aa", "aa"], ["b", "b"])
  assert time.monotonic() - start < 60


def test_a_comparison_after_a_failed_one_tries_again(server, settings):
  server.script = [stand_in.reply(401, "no")]
  judge = make_judge(settings)
  with pytest.raises(judges.JudgeError, match="status 401"):
    judge.compare(["p"], ["aa"], ["b"])
  server.script = [stand_in.reply(500, "")]
  assert judge.compare(["p"], ["aa"], ["b"]) == [1.0]
  assert len(server.requests) == 3


def test_a_crash_keeps_the_answers_before_it(server, settings):
  settings.api.max_tries = 1
  server.script = [stand_in.completion("B"), stand_in.reply(500, "broken")]
  with pytest.raises(judges.JudgeError, match="status 500: broken"):
    make_judge(settings).compare(["p", "q"], ["aa", "aa"], ["b", "b"])
  assert make_judge(settings).compare(["p", "q"], ["aa", "aa"], ["b", "b"]) == [
    0.0,
    1.0,
  ]
  assert len(server.requests) == 3


@pytest.mark.parametrize(
  ("script", "waits"),
  [
    ([stand_in.reply(429, "slow down", Retry_After="7")], [7.0]),
    ([stand_in.reply(429, "", Retry_After="0")], [1.0]),
    ([stand_in.reply(500, "")] * 3, [1.0, 2.0, 4.0]),
    ([stand_in.reply(503, "", Retry_After="soon")], [1.0]),
    ([stand_in.reply(200, "<html>a proxy</html>")], [1.0]),
    ([stand_in.reply(200, "{}")], [1.0]),
    ([stand_in.reply(200, '{"choices": []}')], [1.0]),
    ([stand_in.cut_off, stand_in.hang_up], [1.0, 2.0]),
  ],
)
def test_faults_that_pass_are_waited_for(server, settings, script, waits):
  server.script = list(script)
  found = []
  assert make_judge(settings, found).compare(["p"], ["aa"], ["b"]) == [1.0]
  assert found == waits
  assert len(server.requests) == len(script) + 1


def test_a_date_is_waited_for(server, settings):
  later = email.utils.formatdate(time.time() + 90, usegmt=True)
  server.script = [stand_in.reply(429, "", Retry_After=later)]
  found = []
  make_judge(settings, found).compare(["p"], ["aa"], ["b"])
  assert 60 < found[0] <= 90


def test_waits_grow_to_a_limit_and_vary(settings):
  settings.api.url = "http://127.0.0.1:9/v1"  # where no server is
  settings.api.max_tries = 9
  waits = []
  chat = ChatServer("m", settings.api, sleep=waits.append, jitter=lambda: 0.0)
  with pytest.raises(judges.JudgeError, match=r"no answer in 9 tries.*refused"):
    chat.complete("?")
  assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


def test_a_slow_server_is_asked_again(server, settings):
  released = threading.Event()
  settings.api.timeout_s = 0.1
  server.script = [stand_in.slow(released)]
  waits = []
  assert make_judge(settings, waits).compare(["p"], ["aa"], ["b"]) == [1.0]
  released.set()
  assert waits == [1.0]


def test_a_server_that_asks_for_too_long_a_wait_ends_the_evaluation(
  server, settings
):
  server.script = [stand_in.reply(429, "tomorrow", Retry_After="86400")]
  with pytest.raises(judges.JudgeError, match=r"wait 86,400 s.*tomorrow"):
    make_judge(settings).compare(["p"], ["aa"], ["b"])


@pytest.mark.parametrize("status", [401, 403, 404, 302])
def test_a_server_that_refuses_all_is_asked_once(server, settings, status):
  body = f"no key {KEY}"
  server.script = [stand_in.reply(status, body, Location="http://127.0.0.1:9")]
  with pytest.raises(judges.JudgeError, match=rf"{status}: no key \(key\)"):
    make_judge(settings).compare(["p"], ["aa"], ["b"])
  assert len(server.requests) == 1


def test_a_question_that_is_refused_is_left_out(server, settings, caplog):
  settings.api.max_left_out = 0.5
  server.script = [stand_in.reply(400, "too long")]
  found = make_judge(settings).compare(["p", "q"], ["aa", "aa"], ["b", "b"])
  assert math.isnan(found[0]) and found[1] == 1.0
  assert "left out" in caplog.text and "too long" in caplog.text
  assert len(kept(settings).splitlines()) == 1
  make_judge(settings).compare(["p"], ["aa"], ["b"])  # may be accepted now
  assert len(server.requests) == 3


def test_garbage_is_left_out_named_and_not_asked_again(
  server, settings, caplog
):
  server.script = [stand_in.completion("I am a teapot")]
  settings.api.max_left_out = 0.5
  for _ in range(2):
    wins = judges.compare_in_both_orders(
      make_judge(settings), ["p", "q"], ["aa", "aa"], ["b", "b"]
    )
    found = wins.metrics()
    assert (found["left_out"], found["win_rate"]) == (1.0, 1.0)
  assert caplog.text.count("I am a teapot") == 2
  assert len(server.requests) == 4


def test_much_garbage_stops_at_once(server, settings):
  server.answer = lambda question: "perhaps"
  with pytest.raises(
    judges.JudgeError,
    match=r"to 3 questions.*allows 2.*'perhaps'.*some_model\.jsonl has",
  ):
    make_judge(settings).compare("p" * 20, "abcdefghijklmnopqrst", "z" * 20)
  assert len(server.requests) < 10


def test_calls_and_cost_are_told_before_the_first_question(
  server, settings, caplog
):
  settings.api.price_in, settings.api.price_out = 2.0, 8.0
  make_judge(settings).compare(["p"], ["aa"], ["b"])

  def answer(question):
    assert "to ask" in caplog.text, "asked before the estimate"
    return "A"

  server.answer = answer
  caplog.clear()
  with caplog.at_level(logging.INFO, logger="dpo_jax"):
    texts = ["x" * 400_000] * 9
    make_judge(settings).compare(["p"] * 10, ["aa", *texts], list("bcdefghijk"))
  [line] = [r.getMessage() for r in caplog.records if "to ask" in r.message]
  assert "10 questions, 9 to ask" in line
  # 9 * (400,000 + the template) / 4 tokens, and 9 * 64 of answers.
  num_chars = 9 * (400_000 + len(api.DEFAULT_PROMPT) - 23 + 2)
  assert f"about {num_chars / 4:,.0f} tokens in, at most 576 out" in line
  cost = (num_chars / 4 * 2.0 + 576 * 8.0) / 1e6
  assert f"at most about ${cost:.2f}" in line


@pytest.mark.parametrize("value", [None, "", "  "])
def test_a_missing_key_is_named_by_its_variable(settings, monkeypatch, value):
  settings.api.key_variable = "JUDGE_KEY"
  monkeypatch.delenv("JUDGE_KEY", raising=False)
  if value is not None:
    monkeypatch.setenv("JUDGE_KEY", value)
  with pytest.raises(ValueError, match="variable JUDGE_KEY is not set"):
    judges.get_eval_judge(settings)


def test_a_key_that_is_not_one_is_not_shown(settings, monkeypatch):
  monkeypatch.setenv("OPENAI_API_KEY", "secret\nwords")
  with pytest.raises(ValueError, match="OPENAI_API_KEY is not a key") as error:
    judges.get_eval_judge(settings)
  assert "secret" not in str(error.value)


def test_a_server_without_a_key_gets_none(server, settings):
  settings.api.key_variable = ""
  make_judge(settings).compare(["p"], ["aa"], ["b"])
  assert "Authorization" not in server.requests[0][0]


def test_the_key_is_in_no_file_and_no_log(server, settings, caplog):
  server.script = [stand_in.reply(500, f"you sent {KEY}")]
  with caplog.at_level(logging.DEBUG):
    make_judge(settings).compare(["p"], ["aa"], ["b"])
  assert "you sent (key)" in caplog.text
  assert KEY not in caplog.text + kept(settings)


@pytest.mark.parametrize(
  "act",
  [
    stand_in.reply(500, f"{'x' * 290}{KEY}"),  # at the cut
    stand_in.reply(500, f"{' ' * 2990}{KEY}"),
    stand_in.reply(200, f"you sent {KEY}"),
    stand_in.reply(200, f"{'x' * 290}{KEY}"),
    stand_in.completion(f"you sent {KEY}\nA"),
    stand_in.reason(500, f"you sent {KEY}"),
    stand_in.status_line(f"you sent {KEY}"),
  ],
)
def test_the_key_is_not_shown_where_a_server_repeats_it(
  server, settings, caplog, act
):
  server.script = [act]
  with caplog.at_level(logging.DEBUG):
    make_judge(settings).compare(["p"], ["aa"], ["b"])
  assert KEY[:8] not in caplog.text + kept(settings)


@pytest.mark.parametrize("url", ["", "localhost:8000", "file:///etc/passwd"])
def test_a_judge_without_an_address_says_which_key_to_set(settings, url):
  settings.api.url = url
  with pytest.raises(ValueError, match=r"eval\.api\.url='.*base URL, such as"):
    judges.get_eval_judge(settings)


def test_templates_are_checked(settings, tmp_path):
  path = tmp_path / "template.txt"
  path.write_text("Is {first} better than {other}?")
  settings.judge_prompt = str(path)
  with pytest.raises(ValueError, match=r"lacks \{prompt\}, \{second\}"):
    judges.get_eval_judge(settings)
  settings.judge = "sentiment"
  with pytest.raises(ValueError, match=r"only eval\.judge='api:MODEL' reads"):
    judges.get_eval_judge(settings)


def test_a_judge_that_compares_is_refused_where_scores_are_needed():
  with pytest.raises(
    ValueError, match=r"online\.judge='api:m' compares two.*only eval\.judge"
  ):
    judges.get_judge("api:m", key="online.judge")


def test_answers_need_a_folder_of_this_machine():
  with pytest.raises(ValueError, match=r"appended to gs://bucket/a\.jsonl"):
    Answers("gs://bucket/a.jsonl")
