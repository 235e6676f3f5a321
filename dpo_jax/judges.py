"""Who says how good a response is."""

from collections.abc import Callable

from dpo_jax.data import synthetic

# (prompt, response) -> reward, higher is better.
Judge = Callable[[str, str], float]

JUDGES: dict[str, Judge] = {
  "sentiment": lambda prompt, response: synthetic.sentiment(response),
}


def get_judge(name: str) -> Judge | None:
  """Looks a judge up; '' is none.

  Raises:
    ValueError: an unknown name.
  """
  if not name:
    return None
  if name not in JUDGES:
    raise ValueError(
      f"eval.judge={name!r} must be '' or one of {', '.join(JUDGES)}"
    )
  return JUDGES[name]
