"""A server with OpenAI's interface on loopback, for tests of judges."""

import contextlib
import http.server
import json
import socket
import threading


class StandIn(http.server.ThreadingHTTPServer):
  """Answers questions by a script, then by a function of the question.

  Attributes:
    script: functions that handle the next requests, taken from the front; each
      gets the handler.
    answer: question -> answer of the model.
    requests: (headers, JSON body) of each request.
  """

  daemon_threads = True
  request_queue_size = 64

  def __init__(self, answer):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.answer, self.script, self.requests = answer, [], []
    self.lock = threading.Lock()

  @property
  def url(self):
    return f"http://127.0.0.1:{self.server_port}/v1"

  @property
  def questions(self):
    return [body["messages"][0]["content"] for _, body in self.requests]

  def handle_error(self, request, client_address):
    """A client that gave up, or that a script has cut off."""


class _Handler(http.server.BaseHTTPRequestHandler):
  def log_message(self, *arguments):
    """Nothing."""

  def do_POST(self):
    size = int(self.headers["Content-Length"])
    body = json.loads(self.rfile.read(size))
    with self.server.lock:
      self.server.requests.append((dict(self.headers), body))
      script = self.server.script
      act = script.pop(0) if script else None
    if act is not None:
      act(self)
    else:
      completion(self.server.answer(body["messages"][0]["content"]))(self)


def reply(status, body, **headers):
  """Sends a status, headers and a body."""

  def act(handler):
    content = body.encode()
    handler.send_response(status)
    for name, value in headers.items():
      handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)

  return act


def reason(status, text):
  """Sends a status with a reason, and no body."""

  def act(handler):
    handler.send_response(status, text)
    handler.send_header("Content-Length", "0")
    handler.end_headers()

  return act


def status_line(text):
  """Sends a first line that is not HTTP's."""
  return lambda handler: handler.wfile.write(f"{text}\r\n".encode())


def completion(text, finish_reason="stop"):
  """Sends an answer of the model."""
  choice = {
    "message": {"role": "assistant", "content": text},
    "finish_reason": finish_reason,
  }
  usage = {"prompt_tokens": 100, "completion_tokens": 2}
  return reply(200, json.dumps({"choices": [choice], "usage": usage}))


def slow(released):
  """Sends nothing until an event is set."""
  return lambda handler: released.wait(10)


def cut_off(handler):
  """Closes the connection in the middle of the body."""
  handler.send_response(200)
  handler.send_header("Content-Length", "1000")
  handler.end_headers()
  handler.wfile.write(b'{"choices": [')
  handler.wfile.flush()
  handler.connection.shutdown(socket.SHUT_RDWR)


def hang_up(handler):
  """Closes the connection without an answer."""
  handler.connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def serve(answer):
  """Serves on a free port of loopback, until the block ends."""
  server = StandIn(answer)
  thread = threading.Thread(target=server.serve_forever, args=(0.01,))
  thread.start()
  try:
    yield server
  finally:
    server.shutdown()
    server.server_close()
    thread.join()
