"""A stand-in for gcloud, for tests: a cloud in a folder.

  python gcloud.py FOLDER ARGUMENTS...

Requests are files; workers are homes below FOLDER/workers, where the commands
of ssh run; gs://NAME is FOLDER/buckets/NAME. FOLDER/events.json says what goes
wrong: a list for each of describe, ssh, scp, cat, create and delete, whose
first entry is taken at each call. "ok" does what was asked, "drop" loses the
connection before, "drop_after" after it, "slow" does not answer in time; of
describe another word is the state that is reported, "FAILED: reason" with a
reason. An empty list, or none, is ok. Calls are added to FOLDER/calls.
"""

import datetime
import json
import pathlib
import shutil
import subprocess
import sys
import time

_DROPPED = 255


def main(folder: pathlib.Path, arguments: list[str]) -> int:
  kind = next(
    name
    for name in ("describe", "ssh", "scp", "cat", "create", "delete")
    if name in arguments
  )
  with (folder / "calls").open("a") as file:
    file.write(f"{kind}\n")
  event = take_event(folder, kind)
  if event == "drop":
    print("ssh: connect to host: Connection timed out", file=sys.stderr)
    return _DROPPED
  if event == "slow":
    time.sleep(30)
  code = globals()[kind](folder, arguments, event)
  return _DROPPED if event == "drop_after" else code


def take_event(folder: pathlib.Path, kind: str) -> str:
  path = folder / "events.json"
  events = json.loads(path.read_text())
  waiting = events.get(kind, [])
  event = waiting.pop(0) if waiting else "ok"
  path.write_text(json.dumps(events))
  return event


def create(folder: pathlib.Path, arguments: list[str], event: str) -> int:
  now = datetime.datetime.now(datetime.UTC).isoformat()
  (folder / "request").write_text(now)
  workers = folder / "workers"
  shutil.rmtree(workers, ignore_errors=True)
  shutil.copytree(folder / "image", workers / "0")
  shutil.copytree(folder / "image", workers / "1")
  return 0


def describe(folder: pathlib.Path, arguments: list[str], event: str) -> int:
  if not (folder / "request").exists():
    print("ERROR: NOT_FOUND: Resource was not found", file=sys.stderr)
    return 1
  name, _, reason = event.partition(": ")
  state = {"state": "ACTIVE" if event == "ok" else name}
  if reason:
    state["failedData"] = {"error": {"message": reason}}
  created = (folder / "request").read_text()
  print(json.dumps({"state": state, "createTime": created}))
  return 0


def delete(folder: pathlib.Path, arguments: list[str], event: str) -> int:
  (folder / "request").unlink()
  return 0


def scp(folder: pathlib.Path, arguments: list[str], event: str) -> int:
  return 0


def ssh(folder: pathlib.Path, arguments: list[str], event: str) -> int:
  command = next(a for a in arguments if a.startswith("--command="))
  command = command.removeprefix("--command=")
  if "-m uv" in command:  # what install does is not for here
    return 0
  worst = 0
  for home in sorted((folder / "workers").iterdir()):
    environment = {"HOME": str(home), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["sh", "-c", command], env=environment, check=False)
    worst = max(worst, done.returncode)
  return worst


def cat(folder: pathlib.Path, arguments: list[str], event: str) -> int:
  where = arguments[-1].removeprefix("gs://")
  path = folder / "buckets" / where
  if not path.exists():
    print(
      "ERROR: The following URLs matched no objects or files", file=sys.stderr
    )
    return 1
  print(path.read_text())
  return 0


if __name__ == "__main__":
  sys.exit(main(pathlib.Path(sys.argv[1]), sys.argv[2:]))
