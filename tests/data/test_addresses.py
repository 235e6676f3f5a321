"""Addresses of groups: file and line of their records."""

import json
import os

from dpo_jax.data import checksums, sources
from dpo_jax.data.addresses import find_addresses
from dpo_jax.data.store import Limits, Store, build_store
from dpo_jax.data.tokenizers import ByteTokenizer


def build(path, tmp_path, rows):
  path.write_text("\n".join(json.dumps(row) if row else "" for row in rows))
  return build_store(
    sources.open_source(f"jsonl:{path}"),
    ByteTokenizer(),
    Limits(100, 50),
    str(tmp_path / "cache"),
  )


def pair(i):
  return {"prompt": f"Question {i}", "chosen": "yes", "rejected": "no"}


def test_addresses_survive_blank_lines_dropped_records_and_joins(tmp_path):
  dropped = {**pair(1), "rejected": "yes"}  # identical responses
  one = build(tmp_path / "a.jsonl", tmp_path, [pair(0), None, dropped, pair(2)])
  other = build(tmp_path / "b.jsonl", tmp_path, [dropped, pair(3)])
  assert find_addresses(one, [1, 0]) == [
    f"{tmp_path}/a.jsonl:4",
    f"{tmp_path}/a.jsonl:1",
  ]
  joined = Store.join([one, other])
  lines = ["a.jsonl:1", "a.jsonl:4", "b.jsonl:2"]
  wanted = [f"{tmp_path}/{line}" for line in lines]
  assert find_addresses(joined, range(3)) == wanted
  halves = find_addresses(joined.split_pairs().first_slots(1), range(6))
  assert halves == [address for address in wanted for _ in range(2)]


def test_records_that_are_grouped_have_the_address_of_the_first(tmp_path):
  rows = [
    {"prompt": f"Question {i}", "response": text, "helpfulness": value}
    for i in range(2)
    for text, value in (("yes", 3), ("no", 1), ("maybe", 2))
  ]
  store = build(tmp_path / "a.jsonl", tmp_path, rows)
  lines = [f"{tmp_path}/a.jsonl:{number}" for number in (1, 4)]
  assert find_addresses(store, range(len(store))) == lines


def test_a_source_that_has_changed_gives_no_address(tmp_path, caplog):
  path = tmp_path / "a.jsonl"
  store = build(path, tmp_path, [pair(0), pair(1)])
  path.write_text(json.dumps(pair(7)) + "\n" + json.dumps(pair(8)))
  assert find_addresses(store, [1]) == [""]
  assert "its content has changed" in caplog.text
  path.unlink()
  assert find_addresses(store, [1]) == [""]


def test_a_store_of_an_older_version_gives_no_address(tmp_path):
  store = build(tmp_path / "a.jsonl", tmp_path, [pair(0)])
  folder = tmp_path / "cache" / store.digest
  os.remove(folder / "records.npy")
  os.remove(folder / "checksums.json")
  checksums.write(str(folder))
  older = build(tmp_path / "a.jsonl", tmp_path, [pair(0)])
  assert older.records is None
  assert find_addresses(older, [0]) == [""]
