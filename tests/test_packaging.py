"""An installation has every module; CI has constraints and real tools."""

import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

from packaging.requirements import Requirement
import pytest
import yaml

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


def pins(path):
  """Reads a file of constraints: versions by name."""
  lines = path.read_text().splitlines()
  return dict(line.split("==") for line in lines if not line.startswith("#"))


def requirements(name):
  """Reads a file of requirements, with the files that it includes."""
  for line in (ROOT / name).read_text().splitlines():
    line = line.partition("#")[0].strip()
    if line.startswith("-r "):
      yield from requirements(line.removeprefix("-r "))
    elif line:
      yield Requirement(line)


def workflow():
  return yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())


def test_every_python_of_ci_has_constraints_that_fit_the_requirements():
  pythons = workflow()["jobs"]["tests"]["strategy"]["matrix"]["python"]
  for python in pythons:
    found = pins(ROOT / "constraints" / f"py{python.replace('.', '')}.txt")
    for requirement in requirements("requirements-test.txt"):
      name = re.sub(r"[_.]+", "-", requirement.name).lower()
      assert name in found, f"{python}: {name} has no version"
      assert requirement.specifier.contains(found[name]), (python, name)


def test_ci_runs_the_projects_own_check():
  for job in workflow()["jobs"].values():
    assert [s["run"] for s in job["steps"] if "run" in s] == [".ci/run"]


def test_the_files_that_ci_tests_exist():
  text = (ROOT / ".ci" / "run").read_text()
  named = re.findall(r"tests/[\w/]+(?:\.py)?", text)
  assert named and [name for name in named if not (ROOT / name).exists()] == []


def test_hooks_run_tools_of_the_requirements():
  hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
  tools = {
    requirement.name for requirement in requirements("requirements-test.txt")
  }
  for hook in hooks["repos"][0]["hooks"]:
    assert hook["entry"].split()[0] in tools
