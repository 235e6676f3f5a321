"""What an installation holds: every module, and nothing that is missing."""

import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("dpo_jax", "configs", "experiments")
_IMPORT_ALL = """
import importlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
for name in sys.argv[2:]:
  module = importlib.import_module(name)
  assert pathlib.Path(module.__file__).is_relative_to(root), module.__file__
"""


@pytest.mark.slow
def test_a_wheel_holds_every_module_and_each_can_be_imported(tmp_path):
  source = tmp_path / "source"
  ignore = shutil.ignore_patterns("__pycache__", "figures")
  for name in PACKAGES:
    shutil.copytree(ROOT / name, source / name, ignore=ignore)
  for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, source)
  offline = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
  command = [sys.executable, "-m", "pip", "wheel", *offline]
  subprocess.run([*command, f"--wheel-dir={tmp_path}", source], check=True)
  [wheel] = tmp_path.glob("dpo_jax-*.whl")
  installed = tmp_path / "installed"
  with zipfile.ZipFile(wheel) as file:
    file.extractall(installed)

  def modules(root):
    return sorted(
      ".".join(path.relative_to(root).with_suffix("").parts)
      for name in PACKAGES
      for path in (root / name).rglob("*.py")
    )

  names = modules(source)
  assert len(names) > 60 and modules(installed) == names
  names = [name.removesuffix(".__init__") for name in names]
  subprocess.run(
    [sys.executable, "-c", _IMPORT_ALL, str(installed), *names],
    env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(installed)}
    | {"JAX_PLATFORMS": "cpu", "HOME": str(tmp_path)},
    cwd=tmp_path,
    check=True,
  )
