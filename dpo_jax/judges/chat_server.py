"""A server with OpenAI's interface for chats, asked until it answers."""

from collections.abc import Callable, Mapping
import email.utils
import http.client
import json
import logging
import os
import random
import threading
import time
from typing import Any, NamedTuple
import urllib.error
import urllib.request

from dpo_jax.judges.orders import JudgeError
from dpo_jax.system import files

_LOG = logging.getLogger(__name__)
_FIRST_WAIT_S = 1.0
_LONGEST_WAIT_S = 60.0  # of our own; a server may ask for more
_PATIENCE_S = 600.0  # longest wait that a server may ask for
_SHOWN = 300  # characters of an error
# Faults of one question, such as one that is too long.
_ABOUT_THE_QUESTION = (400, 413, 422)


class Completion(NamedTuple):
  """An answer of the server.

  Attributes:
    text: answer.
    tokens_in: tokens of the question, 0 where the server does not say.
    tokens_out: tokens of the answer.
  """

  text: str
  tokens_in: int
  tokens_out: int


class Unanswered(ValueError):
  """No whole answer to this question; the server may answer others."""


class ServerError(JudgeError):
  """The server refuses all questions, or does not answer any more."""


class _Fault(Exception):
  """A fault that may pass; `wait_s` is what the server asks to wait."""

  def __init__(self, text: str, wait_s: float = 0.0):
    super().__init__(text)
    self.wait_s = wait_s


class _NoRedirects(urllib.request.HTTPRedirectHandler):
  """Does not follow the server elsewhere with the key and the data."""

  def redirect_request(self, *arguments: Any) -> None:
    return None


_OPENER = urllib.request.build_opener(_NoRedirects)


def read_key(variable: str) -> str:
  """Reads the key of a server from the environment; "" without a variable.

  Raises:
    ValueError: the variable is not set, or holds what a header cannot; the
      value is not shown.
  """
  if not variable:
    return ""
  key = os.environ.get(variable, "").strip()
  if not key:
    raise ValueError(
      f"the environment variable {variable} is not set, and eval.api"
      ".key_variable names it: set it to the key of the judge's server. For a"
      " server without a key: --config.eval.api.key_variable=''"
    )
  if not (key.isascii() and key.isprintable() and " " not in key):
    raise ValueError(
      f"the environment variable {variable} is not a key: it holds spaces, or"
      " characters beyond ASCII"
    )
  return key


def read_extra_body(text: str) -> dict[str, Any]:
  """Reads `eval.api.extra_body`, further fields of a request, from JSON.

  A field whose value is None is left out of the request. "" gives {}.

  Raises:
    ValueError: not an object of JSON.
  """
  try:
    extra = files.parse_json(text or "{}")
  except ValueError:
    extra = None
  if not isinstance(extra, dict):
    raise ValueError(
      f"eval.api.extra_body={text!r} must be an object of JSON, such as"
      ' {"temperature": null, "seed": 1}'
    )
  return extra


class ChatServer:
  """A server with OpenAI's interface: POST URL/chat/completions."""

  def __init__(
    self,
    model: str,
    settings: Any,
    *,
    sleep: Callable[[float], Any] | None = None,
    jitter: Callable[[], float] = random.random,
  ):
    """Checks the address and reads the key; asks nothing yet.

    Args:
      model: name of the model, as the server knows it.
      settings: `config.eval.api`.
      sleep: waits for seconds; None for a wait that `stop` ends.
      jitter: a random number in [0, 1), by which waits differ.

    Raises:
      ValueError: no address, no key, or fields that are not JSON.
    """
    if not settings.url.startswith(("http://", "https://")):
      raise ValueError(
        f"eval.judge='api:{model}' needs a server, and"
        f" eval.api.url={settings.url!r}: set it to the base URL, such as"
        " https://api.openai.com/v1 or http://localhost:8000/v1"
      )
    self._url = f"{settings.url.rstrip('/')}/chat/completions"
    self._model, self._settings = model, settings
    self._key = read_key(settings.key_variable)
    self._extra = read_extra_body(settings.extra_body)
    self._stopped = threading.Event()
    self._sleep, self._jitter = sleep or self._stopped.wait, jitter

  @property
  def max_tokens(self) -> int:
    """Maximum tokens of an answer, with those of `eval.api.extra_body`."""
    body = self._body("")
    limit: int = body.get("max_tokens", self._settings.max_tokens)
    return body.get("max_completion_tokens", limit)

  def start(self) -> None:
    """Allows repeated tries again after `stop`."""
    self._stopped.clear()

  def stop(self) -> None:
    """Stops `complete` from trying again, in all threads, until `start`.

    Threads that wait to try again wake, unless `sleep` was given, and raise
    ServerError. A request that is under way, and a first try, still run.
    """
    self._stopped.set()

  def complete(self, text: str) -> Completion:
    """Asks a question, again after a fault that may pass.

    Args:
      text: message of the user.

    Raises:
      Unanswered: the server refuses this question, or cuts its answer.
      ServerError: it refuses every question, gives no answer in
        `eval.api.max_tries`, asks to wait over 10 minutes, or `stop` was
        called.
    """
    tries = self._settings.max_tries
    for number in range(1, tries + 1):
      try:
        return self._ask(text)
      except _Fault as fault:
        if number == tries:
          raise ServerError(
            f"{self._url} gave no answer in {tries} tries, the last: {fault}."
            " Answers so far are kept: the same command asks the rest"
          ) from fault
        if fault.wait_s > _PATIENCE_S:
          raise ServerError(
            f"{self._url} asks to wait {fault.wait_s:,.0f} s: {fault}. Start"
            " again then; answers so far are kept"
          ) from fault
        ours = min(_FIRST_WAIT_S * 2 ** (number - 1), _LONGEST_WAIT_S)
        # Between a half and all of it, so that threads do not come at once.
        wait_s = max(ours * (0.5 + 0.5 * self._jitter()), fault.wait_s)
        _LOG.warning("judge: %s; trying again in %.1f s", fault, wait_s)
        self._sleep(wait_s)
      if self._stopped.is_set():
        raise ServerError(f"{self._url} is not asked any more")
    raise AssertionError("max_tries is at least 1")

  def _ask(self, text: str) -> Completion:
    """Sends one request and returns its answer.

    Raises:
      _Fault: a fault that may pass, such as a timeout.
      Unanswered, ServerError: see `complete`.
    """
    headers = {"Content-Type": "application/json"}
    if self._key:
      headers["Authorization"] = f"Bearer {self._key}"
    request = urllib.request.Request(
      self._url,
      json.dumps(self._body(text)).encode(),
      headers,
    )
    try:
      with _OPENER.open(request, timeout=self._settings.timeout_s) as response:
        return _completion(self._read(response))
    except urllib.error.HTTPError as error:
      raise self._explain(error) from error
    # A timeout, no connection, or one that broke in the middle.
    except (OSError, http.client.HTTPException) as error:
      reason = getattr(error, "reason", None) or error
      raise _Fault(self._redact(f"{self._url}: {reason!r}")) from error

  def _body(self, text: str) -> dict[str, Any]:
    body = {
      "model": self._model,
      "messages": [{"role": "user", "content": text}],
      "temperature": 0,
      "max_tokens": self._settings.max_tokens,
    } | self._extra
    return {name: value for name, value in body.items() if value is not None}

  def _read(self, response: Any) -> bytes:
    """Reads the body of a response, the API key in it replaced by "(key)"."""
    body: bytes = response.read()
    return body.replace(self._key.encode(), b"(key)") if self._key else body

  def _redact(self, text: str) -> str:
    return text.replace(self._key, "(key)") if self._key else text

  def _explain(self, error: urllib.error.HTTPError) -> Exception:
    """Returns the exception that a status of the server stands for.

    It is _Fault for 408, 429 and from 500 on; Unanswered for 400, 413 and 422;
    otherwise ServerError. Its text has the body, without the key.
    """
    try:
      body = self._read(error).decode(errors="replace")
    except (OSError, http.client.HTTPException):
      body = ""
    body = " ".join(body.split())[:_SHOWN]
    reason = self._redact(str(error.reason))
    text = f"{self._url}: status {error.code}: {body or reason}"
    if error.code in (408, 429) or error.code >= 500:
      return _Fault(text, _wait_s(error.headers))
    if error.code in _ABOUT_THE_QUESTION:
      return Unanswered(text)
    return ServerError(text)


def _wait_s(headers: Mapping[str, str]) -> float:
  """Returns the seconds of Retry-After, a number or a date; 0 without it."""
  given = headers.get("Retry-After") or ""
  try:
    return max(float(given), 0.0)
  except ValueError:
    pass
  try:
    then = email.utils.parsedate_to_datetime(given)
  except ValueError:
    return 0.0
  return max(then.timestamp() - time.time(), 0.0)


def _completion(body: bytes) -> Completion:
  """Reads the answer of a server.

  Raises:
    _Fault: something that is not a completion, as a proxy sends.
    Unanswered: the answer is cut at the most tokens that it may have.
  """
  try:
    answer = files.parse_json(body.decode())
    choice = answer["choices"][0]
    text = str(choice["message"]["content"] or "")
    usage = answer.get("usage") or {}
    tokens_in = int(usage.get("prompt_tokens", 0))
    tokens_out = int(usage.get("completion_tokens", 0))
  except (ValueError, LookupError, TypeError, AttributeError) as error:
    shown = " ".join(body.decode(errors="replace").split())[:_SHOWN]
    raise _Fault(f"not a completion: {shown!r}") from error
  if choice.get("finish_reason") == "length":
    raise Unanswered(
      f"an answer cut at {tokens_out} tokens (finish_reason is 'length'):"
      f" {text[-_SHOWN:]!r}. Raise eval.api.max_tokens, or"
      " max_completion_tokens in eval.api.extra_body"
    )
  return Completion(text, tokens_in, tokens_out)
