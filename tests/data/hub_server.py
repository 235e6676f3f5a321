"""A stand-in for the Hub on this machine, of data sets only."""

from collections.abc import Iterator, Mapping
import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse

from huggingface_hub import constants

Files = Mapping[str, bytes]


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"

  def log_message(self, *unused):
    pass

  def do_HEAD(self):
    self.do_GET()

  def do_GET(self):
    url = urllib.parse.urlsplit(self.path)
    parts = list(map(urllib.parse.unquote, url.path.strip("/").split("/")))
    if parts[0] == "api":  # api/datasets/ORG/NAME/WHAT/REVISION
      kind, revision = parts[4:6]
      name = "/".join(parts[2:4])
    else:  # datasets/ORG/NAME/resolve/REVISION/PATH
      kind, revision = parts[3:5]
      name = "/".join(parts[1:3])
    repository = self.server.repositories.get(name)
    if repository is None:
      return self._reply(404, b"", {"X-Error-Code": "RepoNotFound"})
    commits = {commit_of(files): files for files in repository.values()}
    files = repository.get(revision, commits.get(revision))
    if files is None:
      return self._reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
    if kind == "revision":
      return self._reply_json({"id": name, "sha": commit_of(files)})
    if kind == "tree":
      return self._reply_json([_entry(p, x) for p, x in files.items()])
    content = files["/".join(parts[5:])]
    self._reply(
      200, content, {"X-Repo-Commit": commit_of(files), "ETag": _oid(content)}
    )

  def _reply_json(self, value):
    self._reply(200, json.dumps(value).encode(), {})

  def _reply(self, status, content, headers):
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name, value)
    self.send_header("Content-Length", str(len(content)))
    self.end_headers()
    if self.command == "GET":
      self.wfile.write(content)


def _oid(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()


def _entry(path: str, content: bytes) -> dict:
  lfs = {"oid": _oid(content), "size": len(content), "pointerSize": 1}
  entry = {"type": "file", "path": path, "size": len(content), "oid": "0" * 40}
  return entry | {"lfs": lfs}


def commit_of(files: Files) -> str:
  """Returns the commit of these files: 40 hexadecimal digits."""
  oids = sorted((path, _oid(content)) for path, content in files.items())
  return hashlib.sha1(repr(oids).encode()).hexdigest()


@contextlib.contextmanager
def serve(cache_dir: str, monkeypatch) -> Iterator[http.server.HTTPServer]:
  """Answers as the Hub until the context ends.

  Args:
    cache_dir: folder for the downloads of huggingface_hub.
    monkeypatch: fixture of the test.

  Yields:
    The server; its `repositories`, ORG/NAME -> branch -> path -> content, are
    empty at first.
  """
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
  server.daemon_threads = True
  server.repositories = {}
  endpoint = f"http://127.0.0.1:{server.server_port}"
  for name, value in (
    ("ENDPOINT", endpoint),
    (
      "HUGGINGFACE_CO_URL_TEMPLATE",
      endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    ),
    ("HF_HUB_CACHE", cache_dir),
    ("HF_HUB_DISABLE_XET", True),
  ):
    monkeypatch.setattr(constants, name, value)
  thread = threading.Thread(target=server.serve_forever, args=(0.01,))
  thread.start()
  try:
    yield server
  finally:
    server.shutdown()
    thread.join()
    server.server_close()
