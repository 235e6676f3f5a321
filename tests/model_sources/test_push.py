"""A push is one commit, private, with the login of huggingface_hub."""

from absl import flags
import huggingface_hub
from huggingface_hub.utils import _http
import pytest

from dpo_jax import export as export_command
from dpo_jax.model_sources.push import check_push, push
from tests.data import hub_server

_TOKEN = "hf_a_secret"
_OLD = {
  "config.json": b"old",
  "model-00001-of-00002.safetensors": b"old",
  "notes.md": b"kept",
}


@pytest.fixture
def server(tmp_path, monkeypatch):
  monkeypatch.setenv("HF_TOKEN", _TOKEN)
  # Requests are repeated at once.
  monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
  with hub_server.serve(str(tmp_path / "hub"), monkeypatch) as server:
    server.tokens[f"Bearer {_TOKEN}"] = "write"
    yield server


@pytest.fixture
def folder(tmp_path):
  folder = tmp_path / "export"
  (folder / "base").mkdir(parents=True)
  (folder / "config.json").write_text("{}")
  (folder / "model.safetensors").write_bytes(b"weights")
  (folder / "base" / "model.safetensors").write_bytes(b"others")
  (folder / "README.md").write_text("---\nlicense: unknown\n---\n")
  return folder


def push_it(folder, **changes):
  settings = {"is_public": False, "revision": "main", "message": "an export"}
  return push(folder, "me/model", **(settings | changes))


def contents(folder):
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in folder.rglob("*")
    if path.is_file()
  }


def test_a_push_is_one_commit_to_a_private_repository(server, folder):
  assert "/me/model/commit/main" in push_it(folder)
  assert server.repositories == {"me/model": {"main": contents(folder)}}
  assert server.private == {"me/model"}
  assert server.messages == ["an export"]


def test_a_public_repository_is_asked_for(server, folder):
  push_it(folder, is_public=True)
  assert server.private == set()
  with pytest.raises(ValueError, match="public repository: --public allows"):
    push_it(folder)
  push_it(folder, is_public=True)


def test_a_branch_leaves_the_others(server, folder):
  server.repositories["me/model"] = {"main": _OLD}
  server.private.add("me/model")
  push_it(folder, revision="beta-0.1")
  branches = server.repositories["me/model"]
  assert branches["main"] == _OLD
  # Old weights are gone, other files are kept.
  assert branches["beta-0.1"] == {**contents(folder), "notes.md": b"kept"}


@pytest.mark.parametrize(
  ("part", "status", "told"),
  [
    ("create", 429, "429"),
    ("preupload", 500, "500"),
    ("batch", 503, "503"),
    ("upload", 500, "500"),
    ("upload", None, "model.safetensors"),  # cut in the middle
    ("commit", 500, "500"),
    ("commit", None, "disconnected"),
  ],
)
def test_a_failed_push_changes_nothing(server, folder, part, status, told):
  server.repositories["me/model"] = {"main": _OLD}
  server.private.add("me/model")
  server.faults[part] = status
  with pytest.raises(OSError, match=f"(?s){told}.*hf upload me/model") as error:
    push_it(folder)
  assert _TOKEN not in str(error.value)
  assert server.repositories == {"me/model": {"main": _OLD}}
  server.faults.clear()
  push_it(folder)
  assert len(server.messages) == 1


def test_the_hint_of_a_failed_push_names_the_branch(server, folder):
  server.faults["commit"] = 500
  with pytest.raises(OSError, match=r"hf upload .* --revision=beta-0\.1`"):
    push_it(folder, revision="beta-0.1")


def test_flags_of_an_upload_that_nothing_reads_are_named():
  values = flags.FlagValues()
  flags.DEFINE_bool("public", False, "", flag_values=values)
  for name in ("push_to", "revision", "commit_message"):
    flags.DEFINE_string(name, "", "", flag_values=values)
  values(["export"])
  export_command.check_flags(values)
  values(["export", "--public", "--revision=b"])
  with pytest.raises(ValueError, match="--public, --revision: nothing is up"):
    export_command.check_flags(values)
  values.push_to = "me/model"
  export_command.check_flags(values)


@pytest.mark.parametrize(("rights", "status"), [("read", 403), (None, 401)])
def test_a_token_that_may_not_write_is_refused(server, folder, rights, status):
  server.tokens = {f"Bearer {_TOKEN}": rights} if rights else {}
  with pytest.raises(OSError, match=str(status)) as error:
    push_it(folder)
  assert _TOKEN not in str(error.value)
  assert not server.repositories


def test_what_cannot_be_pushed_is_refused_before_the_export(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
  with pytest.raises(ValueError, match="hf auth login"):
    check_push("me/model", "out")
  with pytest.raises(ValueError, match="push_to='model' must be ORG/NAME"):
    check_push("model", "out")
  (tmp_path / "base").mkdir()
  with pytest.raises(ValueError, match="hf auth login"):
    check_push("me/model", tmp_path)
  (tmp_path / "base" / ".env").write_text("SECRET=1")
  with pytest.raises(ValueError, match=r"base/\.env is there already: choose"):
    check_push("me/model", tmp_path)
  with pytest.raises(ValueError, match="must be a local folder"):
    check_push("me/model", "gs://bucket/out")
