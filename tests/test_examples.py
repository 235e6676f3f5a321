"""The examples run, reach what they promise, and fit their notebooks."""

import json
import math
import runpy

import jax
import pytest

from examples import make_notebook


@pytest.fixture
def default_prng():
  """Restores the generator of random numbers, which the example sets."""
  before = jax.config.jax_default_prng_impl
  yield
  jax.config.update("jax_default_prng_impl", before)


@pytest.mark.slow
def test_dpo_from_scratch_reaches_the_known_optimum(default_prng, capsys):
  names = runpy.run_path(str(make_notebook.SCRIPT))
  results = names["results"]
  assert names["losses"][0] == pytest.approx(math.log(2), abs=1e-5)
  assert results["before"][0] == pytest.approx(1.0, abs=0.1)
  assert results["before"][1] == 0.0
  optimum = results["optimum"]
  # sigmoid(2) = 0.8808, and its KL from 1/2 is 0.3278 nats, for each adjective.
  assert optimum == pytest.approx((1.7616, 0.6556), abs=1e-3)
  assert results["after"] == pytest.approx(optimum, abs=0.25)
  assert "adjectives good" in capsys.readouterr().out


def test_dpo_from_scratch_stays_short():
  assert len(make_notebook.SCRIPT.read_text().splitlines()) <= 150


def test_notebook_is_current():
  """If this fails: python -m examples.make_notebook."""
  script = make_notebook.SCRIPT.read_text(encoding="utf-8")
  written = make_notebook.NOTEBOOK.read_text(encoding="utf-8")
  assert written == make_notebook.render(script)


def test_code_of_the_notebook_is_the_script():
  cells = json.loads(make_notebook.NOTEBOOK.read_text())["cells"]
  code = [c["source"] for c in cells if c["cell_type"] == "code"]
  assert code.pop(0) == ["%pip install -q .."]
  lines = "\n".join("".join(source) for source in code).splitlines()
  script = make_notebook.SCRIPT.read_text().split('"""', 2)[2].splitlines()
  kept = [x for x in script if not x.startswith("# %%")]
  assert [x for x in lines if x] == [x for x in kept if x]
