"""A person can read what a run shows, on a terminal and in a pipe."""

import io
import logging
import re
import sys
import time
import types

from absl import logging as absl_logging
import jax
import numpy as np
import pytest

from dpo_jax import command_line
from dpo_jax.config import default_config
from dpo_jax.losses import build_objective
from dpo_jax.records.metrics import Clock
from dpo_jax.system import progress
from dpo_jax.training import console, header
from dpo_jax.training.console import Console
from tests import tiny


@pytest.fixture
def messages(caplog):
  """Lines that were logged, oldest first."""
  caplog.set_level(logging.INFO, "dpo_jax")
  return lambda: [record.getMessage() for record in caplog.records]


@pytest.fixture
def now(monkeypatch):
  """Seconds of the clock, to be set."""
  seconds = [0.0]
  monkeypatch.setattr(time, "monotonic", lambda: seconds[0])
  return seconds


class Terminal(io.StringIO):
  """A stream that is a terminal."""

  def isatty(self):
    return True


def make_console(*, progress=True, total_steps=100):
  """A console of a run of which only what it shows is there."""
  config = default_config()
  config.total_steps = total_steps
  config.log.progress = progress
  config.checkpoint.best_metric = "eval/reward/accuracy"
  config.checkpoint.best_is_lower = False
  objective = build_objective({"name": "dpo"})
  run = types.SimpleNamespace(
    config=config,
    is_writer=True,
    workdir="runs/dpo",
    program=types.SimpleNamespace(objective=objective),
  )
  return Console(run)


def evaluation(accuracy, **others):
  return {
    "loss": 0.51234,
    "reward/accuracy": accuracy,
    "reward/accuracy_low": accuracy - 0.05,
    "reward/accuracy_high": accuracy + 0.05,
    "reward/margin": 0.412,
    "pull/0.5": 0.7,
    **others,
  }


@pytest.mark.parametrize(
  ("value", "digits", "text"),
  [
    (0.69314, 4, "0.6931"),
    (-0.5, 3, "-0.500"),
    (0.0, 3, "0.000"),
    (0.00012, 3, "1.2e-04"),
    (12345.6, 3, "12,346"),
    (7e-5, None, "7e-05"),
    (float("nan"), 3, "nan"),
  ],
)
def test_numbers_are_short_and_keep_what_counts(value, digits, text):
  assert console.format_number(value, digits) == text


@pytest.mark.parametrize(
  ("seconds", "text"),
  [
    (8.31, "8.3 s"),
    (59.97, "1 min 00 s"),
    (83, "1 min 23 s"),
    (7500, "2 h 05 min"),
  ],
)
def test_durations_have_units(seconds, text):
  assert progress.format_seconds(seconds) == text


def test_a_step_is_a_row_of_the_metrics_that_the_loss_has():
  figures = {
    "loss": 0.65,
    "reward/accuracy": 0.75,
    "reward/margin": 0.1,
    "grad_norm": 12.5,
    "learning_rate": 7e-5,
    "groups_per_second": 12.34,
    "tokens_per_second": 1810.4,
    "padding_fraction": 0.1,
  }
  heading, row = console.format_step(10, 1000, figures, "1 min 23 s")
  assert heading == (
    "       step      loss  accuracy    margin  grad norm      rate  groups/s"
    "  tokens/s   time left"
  )
  assert row == (
    "   10/1,000    0.6500     0.750     0.100     12.500     7e-05      12.3"
    "     1,810  1 min 23 s"
  )
  heading, row = console.format_step(1, 9, {"loss": 2.0}, "0.5 s")
  assert heading == "step      loss   time left"
  assert row == " 1/9    2.0000       0.5 s"


def test_the_heading_of_steps_is_shown_every_twenty_rows(messages):
  shown = make_console()
  shown._start = 0
  for step in range(1, 42):
    shown.show(step, "train", {"loss": 0.5})
  is_heading = ["loss" in line for line in messages()]
  assert [i for i, x in enumerate(is_heading) if x] == [0, 21, 42]


def test_an_evaluation_shows_its_main_metrics_and_the_best_so_far(messages):
  shown = make_console()
  more = {"kl": 2.8, "kl_error": 0.1, "sample/win_rate": 0.855}
  shown.show(0, "eval", evaluation(0.5))
  shown.show(25, "eval", evaluation(0.7, **more))
  shown.show(50, "eval", evaluation(0.6))
  shown.show(50, "eval/other", evaluation(0.9))
  assert messages() == [
    "held out    step 0: loss 0.5123, accuracy 0.500 (0.450 to 0.550), margin"
    " 0.412",
    "held out    step 25: loss 0.5123, accuracy 0.700 (0.650 to 0.750), margin"
    " 0.412, KL 2.800 +- 0.100,",
    "            win rate 0.855; the best accuracy so far",
    "held out    step 50: loss 0.5123, accuracy 0.600 (0.550 to 0.650), margin"
    " 0.412;",
    "            best so far: accuracy 0.700 at step 25",
    "held out other step 50: loss 0.5123, accuracy 0.900 (0.850 to 0.950),"
    " margin 0.412",
  ]


def test_the_best_of_a_set_with_a_name_is_told(messages):
  shown = make_console()
  shown._config.checkpoint.best_metric = "other:reward/accuracy"
  for step, accuracy in ((0, 0.5), (25, 0.7), (50, 0.6)):
    shown.show(step, "eval/other", evaluation(accuracy))
    shown.show(step, "eval/first", evaluation(0.9 + step / 1000))
  told = [m for m in messages() if "best" in m]
  assert [m.strip() for m in told] == [
    "the best accuracy so far",
    "best so far: accuracy 0.700 at step 25",
  ]


def test_a_run_ends_with_its_first_its_best_and_its_last_evaluation(messages):
  shown = make_console()
  for step, accuracy in ((0, 0.5), (25, 0.6), (50, 0.7), (100, 0.65)):
    shown.show(step, "eval", evaluation(accuracy))
  before = len(messages())
  shown.end(50)
  assert messages()[before:] == [
    "held out  step 0                  step 50 (best saved)    step 100",
    "--------  ----------------------  ----------------------"
    "  ----------------------",
    "loss      0.5123                  0.5123                  0.5123",
    "accuracy  0.500 (0.450 to 0.550)  0.700 (0.650 to 0.750)"
    "  0.650 (0.600 to 0.700)",
    "margin    0.412                   0.412                   0.412",
    "best        checkpoint of step 50, by eval/reward/accuracy",
    "files       runs/dpo: metrics.jsonl (every metric), checkpoints/",
    "export      python -m dpo_jax.export --workdir=runs/dpo --out=FOLDER",
  ]


def test_a_workdir_says_where_it_stands():
  assert [console.standing(done, 400) for done in (200, 400, 500)] == [
    ("resumed", "from step 200: 200 of 400 steps to train"),
    (
      "finished",
      "before: the workdir holds all 400 steps, so nothing is trained; a larger"
      " total_steps trains on",
    ),
    (
      "finished",
      "before: the workdir holds step 500, beyond total_steps=400, so nothing"
      " is trained",
    ),
  ]


def test_rows_are_aligned_and_items_stay_whole():
  text = header.join(["one of them"] * 9)
  lines = header.format_rows([("loss", "dpo"), ("held out set", text)])
  assert lines == [
    "loss        dpo",
    "held out set " + ", ".join(["one of them"] * 6) + ",",
    " " * 12 + ", ".join(["one of them"] * 3),
  ]
  path = "x" * 200
  assert path in header.format_rows([("workdir", path)])[-1]


@pytest.mark.parametrize(
  ("loss", "text"),
  [
    ({"name": "ipo", "tau": 0.2}, "ipo (tau 0.2, length_normalize False)"),
    ({"name": "dpo", "reward": "logps"}, "dpo (reward logps, beta 0.1)"),
    (
      [{"name": "dpo", "weight": 1.0}, {"name": "sft", "weight": 0.5}],
      "dpo (beta 0.1, weight 1) + sft (per_sequence False, weight 0.5)",
    ),
  ],
)
def test_a_loss_is_described_by_the_knobs_that_it_reads(loss, text):
  assert header.describe_loss(build_objective(loss).to_dict()) == text


def test_a_source_is_described_by_what_was_dropped_and_cut():
  report = {
    "source": "jsonl:pairs.jsonl",
    "records": 1200,
    "groups": 1150,
    "dropped": {"empty_response": 48},
    "broken": 2,
    "unread": ["id", "source"],
    "prompts_cut": 0,
    "responses_cut": 7,
  }
  assert header.describe_report(report) == (
    "jsonl:pairs.jsonl: 1,150 groups of 1,200 records; dropped: 48"
    " empty_response, 2 broken; cut: 7 responses; columns not read: id, source"
  )
  entries = [{"source": "a", "weight": 3}, {"source": "b", "weight": 1}]
  shares = header.mixture_shares(entries)
  assert shares["b"] == "; 25 % of the training groups"


def test_batches_are_described_by_what_is_in_them():
  loader = tiny.make_loader(tiny.make_groups(40), 8)
  batches = [loader.batch(step) for step in range(8)]
  tokens = sum(int((b.segments > 0).sum()) for b in batches)
  capacity = sum(b.tokens.size for b in batches)
  text = header.describe_batches(loader)
  assert text.startswith(f"8 groups, about {tokens / 8:,.0f} tokens; rows x")
  assert text.endswith(f"{100 * (1 - tokens / capacity):.0f} % padding")
  lengths = sorted(loader.store.lengths.sum(1))
  assert header.describe_lengths(loader).startswith("40 groups; tokens a group")
  assert f"longest {lengths[-1]}" in header.describe_lengths(loader)


@pytest.mark.fault(31)
def test_counts_keep_their_last_digits(now):
  """2**24 + 1 tokens, which float32 cannot hold."""
  clock = Clock()
  for tokens in (2.0**24, 1.0):
    clock.count({"num_groups": 1.0, "num_tokens": tokens})
  now[0] = 1.0
  assert clock.rates()["tokens_per_second"] == 2**24 + 1


def test_groups_per_second_leave_evaluation_and_compilation_out(now):
  clock = Clock()
  now[0] = 2.0
  clock.count({"num_groups": 8.0, "num_tokens": 100.0})
  clock.pause()
  now[0] = 10.0  # an evaluation
  clock.resume()
  now[0] = 15.0
  clock.leave_out(3.0)
  clock.count({"num_groups": 8.0, "num_tokens": 300.0})
  rates = clock.rates()
  assert rates == {
    "groups_per_second": 4.0,
    "tokens_per_second": 100.0,
    "host_wait_fraction": 0.0,
  }
  now[0] = 16.0
  clock.count({"num_groups": 8.0, "num_tokens": 50.0})
  assert clock.rates()["groups_per_second"] == 8.0


def test_the_wait_for_batches_is_a_fraction_of_the_time(now):
  def batches():
    for i in range(2):
      now[0] += 1.0  # made while the loop waits
      yield i

  clock = Clock()
  for _ in clock.waiting(batches()):
    now[0] += 3.0  # a step
  assert clock.rates()["host_wait_fraction"] == pytest.approx(2.0 / 8.0)


def test_a_compilation_is_told_and_left_out_of_the_rates(messages, now):
  def train_step(x):
    return 2 * x

  shown = make_console()
  with shown:
    step = jax.jit(train_step)
    for size in (2, 2, 3):
      step(np.ones(size))
    left_out = -shown._clock._seconds
  jax.jit(train_step)(np.ones(4))
  assert [re.sub(r"[\d.]+ s", "? s", line) for line in messages()] == [
    "compiling   the training step",
    "compiled    the training step in ? s",
    "compiled    the training step for another shape of batch in ? s",
  ]
  assert left_out == shown._compiling > 0


def test_the_time_of_a_compilation_has_all_its_parts(messages):
  shown = make_console()
  for part, seconds in (
    ("jaxpr_trace", 1.0),
    ("jaxpr_to_mlir_module", 2.0),
    ("backend_compile", 3.5),
  ):
    jitted = "eval_step" if part == "jaxpr_trace" else "jit(eval_step)"
    event = f"/jax/core/compile/{part}_duration"
    shown._on_event(event, seconds, fun_name=jitted)
    shown._on_event(event, seconds, fun_name="other")
  assert messages() == [
    "compiling   the evaluation step",
    "compiled    the evaluation step in 6.5 s",
  ]
  assert shown._compiling == 0.0  # the clock of training stands meanwhile


def train_five_steps(shown):
  for step, _ in enumerate(shown.watch((i for i in range(5)), 5), 5):
    metrics = {"loss": np.float32(0.6931), "reward/accuracy": np.float32(0.75)}
    shown.count(metrics, {"num_groups": 8.0, "num_tokens": 1.0})
    shown.show(step + 1, "train", metrics | shown.rates())


def test_a_terminal_has_a_bar_below_whole_lines(logs, monkeypatch):
  terminal = Terminal()
  monkeypatch.setattr(sys, "stderr", terminal)
  command_line.show_logs()
  train_five_steps(make_console(total_steps=10))
  frames = re.split("[\r\n]", terminal.getvalue())
  assert any("dpo:" in frame and "9/10" in frame for frame in frames)
  assert any("loss=0.6931, accuracy=0.750" in frame for frame in frames)
  (row,) = (frame for frame in frames if frame.startswith("10/10"))
  assert row.split()[1:3] == ["0.6931", "0.750"]


@pytest.mark.fault(43)
def test_a_log_that_cannot_be_written_stops_nothing(logs, monkeypatch):
  """Orbax takes an error in a log call for the end of a failed save."""

  class Full(io.StringIO):
    def write(self, text):
      raise OSError(28, "No space left on device")

  monkeypatch.setattr(sys, "stderr", Full())
  command_line.show_logs()
  train_five_steps(make_console(total_steps=10))


@pytest.mark.parametrize("flag", ["", "--debug"])
def test_tracebacks_of_libraries_are_for_debugging(
  logs, capsys, monkeypatch, flag
):
  monkeypatch.setattr(sys, "argv", ["train", flag])
  command_line.show_logs()
  try:
    raise OSError("full")
  except OSError:
    logging.getLogger("absl").exception("a thread failed")
  shown = capsys.readouterr().err
  assert "a thread failed" in shown
  assert ("Traceback" in shown) == bool(flag)


@pytest.mark.parametrize("progress", [True, False])
def test_a_pipe_has_lines_with_the_time_and_no_bar(logs, capsys, progress):
  command_line.show_logs()
  train_five_steps(make_console(progress=progress, total_steps=10))
  shown = capsys.readouterr().err
  assert "\r" not in shown
  lines = shown.splitlines()
  assert [line.split()[2] for line in lines[1:]] == [
    f"{step}/10" for step in range(6, 11)
  ]
  for line in lines:
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line)
    assert len(line) <= 120


def test_a_long_loop_in_a_pipe_is_a_line_a_minute(now, messages):
  for _ in progress.track(range(10), "scoring", total=10, unit="batches"):
    now[0] += 25.0
  assert messages() == [
    "scoring     3 of 10 batches, 2 min 55 s left",
    "scoring     6 of 10 batches, 1 min 40 s left",
    "scoring     9 of 10 batches, 25.0 s left",
  ]
  for _ in progress.track(range(10), "", total=10, unit="batches"):
    now[0] += 100.0
  assert len(messages()) == 3


def test_our_log_is_shown_however_a_module_was_started(logs, capsys):
  absl_logging.set_verbosity(absl_logging.INFO)
  logging.getLogger().addHandler(absl_logging.get_absl_handler())
  command_line.show_logs()
  for name in ("__main__", "dpo_jax.train", "experiments.sweep"):
    logging.getLogger(name).info("from %s", name)
  logging.getLogger("other").info("noise")
  absl_logging.info("noise of Orbax")
  logging.getLogger("other").warning("what matters")
  lines = [x.split(" ", 2)[2] for x in capsys.readouterr().err.splitlines()]
  assert lines == [
    "from __main__",
    "from dpo_jax.train",
    "from experiments.sweep",
    "warning: what matters",
  ]


def test_other_hosts_show_warnings_only_and_their_index(logs, capsys):
  command_line.show_logs()
  command_line.show_logs(3)
  log = logging.getLogger("dpo_jax.train")
  log.info("step 1")
  log.warning("a damaged checkpoint")
  (line,) = capsys.readouterr().err.splitlines()
  assert line.endswith(" host 3: warning: a damaged checkpoint")
