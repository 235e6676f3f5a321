"""A stand-in for the Hub on this machine: reads data sets, takes models."""

import base64
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
    parts = self._parts()
    if parts[0] == "api":  # api/datasets/ORG/NAME/WHAT/REVISION
      kind, revision = parts[4:6] if parts[4:] else ("revision", "main")
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
      is_private = name in self.server.private
      found = {"id": name, "sha": commit_of(files), "private": is_private}
      return self._reply_json(found)
    if kind == "tree":
      return self._reply_json([_entry(p, x) for p, x in files.items()])
    content = files["/".join(parts[5:])]
    self._reply(
      200, content, {"X-Repo-Commit": commit_of(files), "ETag": _oid(content)}
    )

  def do_POST(self):
    body = self.rfile.read(int(self.headers["Content-Length"]))
    parts = self._parts()
    if self._refuses(parts):
      return None
    kind, where = parts[4:6] if parts[4:] else (parts[-1], "")
    if kind == "commit":
      self._commit("/".join(parts[2:4]), where, body.splitlines())
      return self._reply_json({"commitUrl": self.path, "commitOid": "0" * 40})
    sent = json.loads(body)
    reply = {}
    if parts[1:] == ["repos", "create"]:
      name = f"{sent['organization']}/{sent['name']}"
      reply = {"url": f"{constants.ENDPOINT}/{name}"}
      if name in self.server.repositories:
        return self._reply(409, json.dumps(reply).encode(), {})
      self.server.repositories[name] = {"main": {}}
      if sent["visibility"] == "private":
        self.server.private.add(name)
    elif kind == "branch":
      branches = self.server.repositories["/".join(parts[2:4])]
      branches.setdefault(where, branches["main"])
    elif kind == "preupload":
      reply["files"] = [
        {
          "path": file["path"],
          "uploadMode": "lfs" if "safetensors" in file["path"] else "regular",
          "shouldIgnore": False,
        }
        for file in sent["files"]
      ]
    elif kind == "objects":  # large files
      href = f"{constants.ENDPOINT}/upload/"
      reply["objects"] = [
        {**x, "actions": {"upload": {"href": href + x["oid"]}}}
        for x in sent["objects"]
      ]
    self._reply_json(reply)

  def do_PUT(self):
    content = self.rfile.read(int(self.headers["Content-Length"]))
    if not self._refuses(self._parts(), needs_token=False):
      self.server.uploaded[_oid(content)] = content
      self._reply(200, b"", {})

  def _parts(self):
    path = urllib.parse.urlsplit(self.path).path
    return [urllib.parse.unquote(part) for part in path.strip("/").split("/")]

  def _refuses(self, parts, *, needs_token=True):
    """Answers a request with the fault that a test asks for, if any."""
    for part, status in self.server.faults.items():
      if part in parts:
        if status is None:  # the connection is cut
          self.close_connection = True
          self.connection.close()
        else:
          self._reply(status, b"{}", {})
        return True
    rights = self.server.tokens.get(self.headers.get("Authorization"))
    if needs_token and rights != "write":
      self._reply(401 if rights is None else 403, b"{}", {})
      return True
    return False

  def _commit(self, name, branch, lines):
    files = dict(self.server.repositories[name][branch])
    for line in map(json.loads, lines):
      value = line["value"]
      if line["key"] == "header":
        self.server.messages.append(value["summary"])
      elif line["key"] == "file":
        files[value["path"]] = base64.b64decode(value["content"])
      elif line["key"] == "lfsFile":
        files[value["path"]] = self.server.uploaded[value["oid"]]
      else:
        del files[value["path"]]
    self.server.repositories[name][branch] = files

  def _reply_json(self, value):
    self._reply(200, json.dumps(value).encode(), {})

  def _reply(self, status, content, headers):
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name, value)
    self.send_header("Content-Length", str(len(content)))
    self.end_headers()
    if self.command != "HEAD":
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
    empty at first. `private` and `messages` are what models were pushed with;
    `tokens`, Authorization -> "read" or "write", and `faults`, part of a path
    -> status or None for a cut connection, are for a test to fill.
  """
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
  server.daemon_threads = True
  server.repositories, server.uploaded = {}, {}
  server.private, server.messages = set(), []
  server.tokens, server.faults = {}, {}
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
