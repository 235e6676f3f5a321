"""Chat templates: transformers' text, and a child that cannot do harm."""

import datetime
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from dpo_jax.data.dialogues import Request
from dpo_jax.data.messages import RecordError
from dpo_jax.data.template_child import Caps
from dpo_jax.data.templates import ChatTemplate
from dpo_jax.data.tokenizers import HFTokenizer
from tests import faults
from tests.data import folders

USER = {"role": "user", "content": 'what is 2 < 3 & "é"?'}
YES = {"role": "assistant", "content": "  it is true\n"}
SYSTEM = {"role": "system", "content": "be brief"}
CALL = {
  "role": "assistant",
  "content": None,
  "tool_calls": [
    {
      "type": "function",
      "function": {"name": "search", "arguments": {"query": "<é>", "n": 2}},
    }
  ],
}
FOUND = {"role": "tool", "name": "search", "content": "nothing"}
TOOLS = [
  {
    "type": "function",
    "function": {
      "name": "search",
      "description": "looks & finds",
      "parameters": {
        "type": "object",
        "properties": {"query": {"type": "string"}, "n": {"type": "integer"}},
      },
    },
  }
]
DATE = datetime.date(2024, 7, 26)

# In the styles of the families, each with what is peculiar to it.
STYLES = {
  "llama3": """
{{- bos_token }}
{%- if not date_string is defined %}
  {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0]["role"] == "system" %}
  {%- set system = messages[0]["content"] | trim %}
  {%- set rest = messages[1:] %}
{%- else %}
  {%- set system, rest = "", messages %}
{%- endif %}
{{- "<|start|>system<|end|>\\n\\nToday: " ~ date_string ~ "\\n\\n" ~ system }}
{%- if tools is not none %}
  {{- "\\nYou may call:\\n" }}
  {%- for tool in tools %}{{ tool | tojson(indent=4) }}{% endfor %}
{%- endif %}
{{- "<|eot|>" }}
{%- for m in rest %}
  {%- if "tool_calls" in m %}
    {%- if m.tool_calls | length != 1 %}
      {{- raise_exception("one call at once") }}
    {%- endif %}
    {%- set call = m.tool_calls[0].function %}
    {{- "<|start|>assistant<|end|>\\n\\n" }}
    {{- '{"name": "' + call.name + '", ' -}}
    {{- '"parameters": ' ~ (call.arguments | tojson) ~ "}<|eot|>" }}
  {%- elif m.role in ("tool", "ipython") %}
    {{- "<|start|>ipython<|end|>\\n\\n" ~ (m.content | tojson) ~ "<|eot|>" }}
  {%- else %}
    {{- "<|start|>" + m.role + "<|end|>\\n\\n" + m.content | trim + "<|eot|>" }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- "<|start|>assistant<|end|>\\n\\n" }}
{%- endif %}
""",
  "qwen": """
{%- if tools %}
<|im_start|>system
{{ messages[0].content if messages[0].role == 'system' else '' }}# Tools
{% for tool in tools %}
{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for m in messages %}
    {%- if m.role == 'system' and tools %}{% continue %}{% endif %}
    {%- set content = m.content if m.content is string else '' %}
    {%- if m.role == 'assistant' %}
<|im_start|>assistant
{% generation %}
{{- content }}
{%- for call in m.tool_calls or [] %}
<tool_call>
{{ {'name': call.function.name, 'arguments': call.function.arguments}
   | tojson }}
</tool_call>
{%- endfor %}
<|im_end|>
{% endgeneration %}
    {%- else %}
<|im_start|>{{ m.role }}
{{ content }}<|im_end|>
    {%- endif %}
{% endfor %}
{%- if add_generation_prompt %}
<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}
<think>

</think>

{% endif %}
{%- endif %}
""",
  "gemma": """
{{ bos_token }}
{%- set ns = namespace(system='') %}
{%- for m in messages %}
  {%- if m.role == 'system' %}{% set ns.system = m.content + '\\n\\n' %}
  {%- else %}
    {%- set role = 'model' if m['role'] == 'assistant' else m['role'] %}
    {{- '<start_of_turn>' + role + '\\n' }}
    {{- ns.system + (m['content'] or '') | trim }}
    {%- set ns.system = '' %}
    {{- '<end_of_turn>\\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
""",
  "zephyr": """
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + (message['content'] or '') + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}
""",
}
CONVERSATIONS = [
  ([USER], {}),
  ([SYSTEM, USER, YES, USER], {}),
  ([USER, YES, USER, YES], {"enable_thinking": False}),
  ([SYSTEM, USER, CALL, FOUND, YES], {"tools": TOOLS}),
  ([USER, CALL, FOUND], {"tools": TOOLS, "date_string": "1 Jan"}),
]


def make(source, **caps):
  return ChatTemplate(
    source, {"bos_token": "<s>"}, date=DATE, caps=Caps(**caps) if caps else None
  )


def render(template, messages=(USER,), header=True, extras=None):
  [text] = template.render([Request(list(messages), header, extras or {})])
  return text


# Processes that tests of other files left to be waited for.
_OLDER: set[str] = set()


@pytest.fixture(autouse=True, scope="module")
def older_children():
  _OLDER.update(map(str, children()))
  yield
  _OLDER.clear()


def children(of=None):
  """Processes that render, of ours or another's, or were never waited for."""
  found = []
  for name in os.listdir("/proc"):
    if name.isdigit():
      try:
        with open(f"/proc/{name}/stat") as file:
          parent = int(file.read().rpartition(")")[2].split()[1])
        with open(f"/proc/{name}/cmdline") as file:
          command = file.read()
      except (FileNotFoundError, ProcessLookupError):
        continue
      if (
        name not in _OLDER
        and parent == (of or os.getpid())
        and (not command or "template_child" in command)
      ):
        found.append(int(name))
  return found


def assert_same_text(folder, monkeypatch):
  transformers = pytest.importorskip("transformers")
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  today = datetime.date.today().isoformat()
  ours = HFTokenizer(folder, template_date=today)
  assert ours.has_chat_template
  for messages, extras in CONVERSATIONS:
    for header in (False, True):
      expected = theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=header, **extras
      )
      assert ours.render(messages, header, extras) == expected


@pytest.mark.parametrize("style", STYLES)
def test_text_is_that_of_transformers(style, tmp_path, monkeypatch):
  folder = folders.write_folder(tmp_path, chat_template=STYLES[style])
  assert_same_text(folder, monkeypatch)


def test_text_of_a_real_template_is_that_of_transformers(
  real_data, monkeypatch
):
  folder = str(real_data / "tokenizers" / "chatml_6400")
  assert_same_text(folder, monkeypatch)


def test_a_template_sees_the_date_that_it_was_given():
  text = render(make("{{ strftime_now('%d %b %Y') }}"))
  assert text == "26 Jul 2024"


def test_tools_are_null_where_there_are_none():
  """Not undefined, which `is not none` would take for tools."""
  source = "{{ tools is none }} {{ documents is none }} {{ other is defined }}"
  assert render(make(source)) == "True True False"


@pytest.mark.fault(61)
@pytest.mark.parametrize(
  ("source", "message"),
  [
    ("{{ 'x' * 5000000 }}", "wrote more than 4500000 characters"),
    (
      "{% for i in range(9000) %}{% for j in range(9000) %}{{ 'endless ' }}"
      "{% endfor %}{% endfor %}",
      "wrote more than 4500000 characters",
    ),
    ("{{ 'x' * 10**9 }}", "needed more memory than 512 MiB"),
    (
      "{% set n = namespace(s='x') %}{% for i in range(40) %}"
      "{% set n.s = n.s ~ n.s %}{% endfor %}",
      "needed more memory than 512 MiB",
    ),
    ("{{ raise_exception('no system') }}", "TemplateError: no system"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ("{% for %}", "TemplateSyntaxError"),
  ],
)
def test_what_a_template_may_not_do_is_named(source, message):
  template = make(source)
  for _ in range(2):  # and again, in another child or the same
    error = render(template)
    assert isinstance(error, RecordError)
    assert message in str(error)
    assert "roles ['user']" in str(error)
  template.close()
  assert not children()


@pytest.mark.fault(61)
@pytest.mark.parametrize(
  "source",
  [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
    "{% endfor %}",
    # One step of the interpreter, which no signal of Python's interrupts.
    "{{ (messages[0].content | length + 7) ** (3 ** 19) > 0 }}",
  ],
)
def test_an_endless_template_is_killed(source):
  template = make(source, seconds=1)
  start = time.monotonic()
  error = render(template)
  assert "took longer than 1 s" in str(error)
  assert time.monotonic() - start < 10
  assert not children()


def test_a_fault_costs_its_own_request_only():
  """A child that is killed takes no other conversation with it."""
  source = "{{ messages[0].content }}{{ 'x' * messages[0].size }}"
  sizes = [0, 10**9, 1, 10**9, 10**7, 2]
  template = make(source)
  texts = list(
    template.render(
      [
        Request([{"role": "user", "content": str(i), "size": size}], False, {})
        for i, size in enumerate(sizes)
      ]
    )
  )
  assert [texts[i] for i in (0, 2, 5)] == ["0", "2x", "5xx"]
  assert "memory" in str(texts[1]) and "memory" in str(texts[3])
  assert "characters" in str(texts[4])


def test_many_large_conversations_fill_no_pipe():
  """More than a pipe holds, both ways, and more than one batch."""
  template = make("{{ messages[0].content }}")
  contents = [f"{i} " * 5000 for i in range(300)]
  texts = list(
    template.render(
      [Request([{"role": "user", "content": c}], False, {}) for c in contents]
    )
  )
  assert texts == contents


def test_a_child_that_was_killed_is_replaced():
  template = make("{{ messages[0].content }}")
  assert render(template) == USER["content"]
  [pid] = children()
  os.kill(pid, signal.SIGKILL)
  assert "ended its process with exit code -9" in str(render(template))
  assert render(template) == USER["content"]
  assert len(children()) == 1


def test_no_child_outlives_its_template():
  template = make("{{ messages[0].content }}")
  render(template)
  assert len(children()) == 1
  del template
  assert not children()


def test_the_child_loads_no_jax():
  """It starts for every run, and must not hold a device."""
  code = (
    "import sys, dpo_jax.data.template_child;"
    "print({'jax', 'numpy', 'tokenizers', 'etils'} & set(sys.modules))"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == "set()"


def test_what_json_cannot_hold_is_an_error():
  template = make("{{ messages[0].content }}")
  moment = datetime.datetime(2024, 1, 1)
  error = render(template, [{"role": "user", "content": moment}])
  assert isinstance(error, RecordError)
  assert "datetime is not a type of JSON" in str(error)
  assert render(template) == USER["content"]


def test_what_json_cannot_hold_costs_its_own_request_only():
  """A time in the second and the last of four messages."""
  template = make("{{ messages[0].content }}")
  moment = datetime.datetime(2024, 1, 1)
  contents = ["a", moment, "b", moment]
  texts = list(
    template.render(
      [Request([{"role": "user", "content": x}], False, {}) for x in contents]
    )
  )
  assert texts[::2] == ["a", "b"]
  for error in texts[1::2]:
    assert isinstance(error, RecordError)
    assert "JSON cannot" in str(error)


def test_half_a_character_passes_through():
  """It is told with its line where text is checked, and not here."""
  text = json.loads('"\\ud83d"')
  assert render(make("{{ messages[0].content }}"), [{**USER, "content": text}])


ENDLESS = (
  "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
  "{% endfor %}"
)


def test_renders_that_take_too_long_together_are_stopped():
  """Each is within its own cap."""
  template = make(ENDLESS.replace("99999", "2000"))
  requests = [Request([USER], False, {})] * 100
  start = time.monotonic()
  with pytest.raises(
    TimeoutError, match=r"\d of 100 conversations in"
  ) as error:
    list(template.render(requests, timeout_s=1.0))
  assert "data.template_timeout_s=1." in str(error.value)
  assert time.monotonic() - start < 5
  assert not children()


def test_an_error_is_given_before_what_follows_is_rendered():
  template = make(ENDLESS, seconds=1)
  start = time.monotonic()
  replies = template.render([Request([USER], False, {})] * 100)
  assert "took longer than 1 s" in str(next(replies))
  assert time.monotonic() - start < 8
  replies.close()
  assert not children()


def test_unread_replies_are_not_those_to_the_next_requests():
  template = make("{{ messages[0].content }}")
  others = template.render([Request([YES], False, {})] * 3)
  assert next(others) == YES["content"]
  others.close()
  assert render(template) == USER["content"]


def test_interleaved_renders_do_not_mix():
  template = make("{{ messages[0].content }}")
  requests = [
    [Request([{"role": "user", "content": f"{name}{i}"}], False, {})] * 3
    for i, name in enumerate("ab")
  ]
  pairs = zip(*(template.render(some) for some in requests), strict=True)
  assert list(pairs) == [("a0", "b1")] * 3
  assert len(children()) == 1  # the second one's has ended


def processor_seconds(pid):
  """Processor time of a process; 0 once it has ended."""
  try:
    with open(f"/proc/{pid}/stat") as file:
      state, *fields = file.read().rpartition(")")[2].split()
  except (FileNotFoundError, ProcessLookupError):
    return 0.0
  ticks = 0 if state == "Z" else int(fields[10]) + int(fields[11])
  return ticks / os.sysconf("SC_CLK_TCK")


@pytest.mark.skipif(sys.platform != "linux", reason="Linux ends the child")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_render_outlives_a_process_that_is_ended(number):
  code = f"""
import datetime
from dpo_jax.data.dialogues import Request
from dpo_jax.data.template_child import Caps
from dpo_jax.data.templates import ChatTemplate
template = ChatTemplate(
  {ENDLESS!r}, {{}}, date=datetime.date.today(), caps=Caps(seconds=60)
)
list(template.render([Request([], False, {{}})]))
"""
  process, found = faults.spawn(code), []

  def is_rendering():
    found[:] = children(process.pid)
    return any(processor_seconds(pid) > 1.0 for pid in found)

  assert faults.kill_when(process, is_rendering, number) == -number
  deadline = time.monotonic() + 5
  while any(map(processor_seconds, found)):
    assert time.monotonic() < deadline, "it still renders"
    time.sleep(0.01)
