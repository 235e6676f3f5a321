"""Version of the code: a commit, in a checkout and in an archive of one."""

import os
import subprocess

import dpo_jax

# `git archive` writes the commit here, as .gitattributes says.
_ARCHIVED = "$Format:%H$"
_ROOT = os.path.dirname(os.path.dirname(dpo_jax.__file__))


def code_version() -> str:
  """Returns the commit, with "-dirty" for changed files; or the release."""
  if os.path.exists(os.path.join(_ROOT, ".git")):
    done = subprocess.run(
      ["git", "describe", "--always", "--dirty", "--abbrev=40"],
      cwd=_ROOT,
      capture_output=True,
      text=True,
      check=False,
    )
    if done.returncode == 0:
      return done.stdout.strip()
  if not _ARCHIVED.startswith("$"):
    return _ARCHIVED
  return f"release {dpo_jax.__version__}"
