"""A judge that looks rewards up in a JSONL table."""

from dpo_jax.judges.base import Judge, per_text
from dpo_jax.system import files, inputs


def read_table(path: str) -> Judge:
  """Returns a judge that looks rewards up in a JSONL table.

  Args:
    path: JSONL of {"prompt", "response", "reward"}.

  Returns:
    A judge that raises ValueError for a response that the table lacks.

  Raises:
    FileNotFoundError: no such file.
    ValueError: a line that is not such an object.
  """
  table: dict[tuple[str, str], float] = {}
  with inputs.existing(path).open("r") as file:
    for number, line in enumerate(file, 1):
      try:
        row = files.parse_json(line)
        table[row["prompt"], row["response"]] = float(row["reward"])
      except (ValueError, OverflowError, KeyError, TypeError) as error:
        raise ValueError(
          f'{path}:{number}: not {{"prompt", "response", "reward"}}: {error!r}'
        ) from error

  def look_up(prompt: str, response: str) -> float:
    if (prompt, response) not in table:
      raise ValueError(
        f"{path} has no reward for the response {response!r} to {prompt!r}"
      )
    return table[prompt, response]

  return per_text(look_up)
