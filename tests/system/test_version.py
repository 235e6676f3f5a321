"""The version of the code is known in a checkout, an archive and a release."""

import pathlib

import dpo_jax
from dpo_jax.system import version

_ROOT = pathlib.Path(__file__).parents[2]


def test_an_archive_holds_the_commit_it_was_made_of(tmp_path, monkeypatch):
  monkeypatch.setattr(version, "_ROOT", str(tmp_path))
  assert version.code_version() == f"release {dpo_jax.__version__}"
  monkeypatch.setattr(version, "_ARCHIVED", "a" * 40)
  assert version.code_version() == "a" * 40
  # `git archive` fills in the commit where the attributes say so.
  assert version.__file__ is not None
  path = pathlib.Path(version.__file__).relative_to(_ROOT)
  attributes = (_ROOT / ".gitattributes").read_text().split()
  assert attributes == [str(path), "export-subst"]
  assert "$Format:%H$" in (_ROOT / path).read_text()
