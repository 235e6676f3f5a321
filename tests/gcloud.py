"""A stand-in for gcloud, for tests: a folder plays the cloud.

  python gcloud.py FOLDER ARGUMENTS...

Requests are files. Workers are home folders below FOLDER/workers, where ssh
runs its commands and scp copies its files. gs://NAME is FOLDER/buckets/NAME,
also for workers. FOLDER/events.json lists faults for each of describe, ssh,
scp, cp, cat, create and delete; each call takes the first entry. "ok" does what
was asked; "drop" loses the connection before it, and "drop_after" after it;
"slow" does not answer in time. For describe, another word is the state that it
reports, as in "FAILED: reason". An empty or missing list means "ok". Calls are
appended to FOLDER/calls.
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
    for name in ("describe", "ssh", "scp", "cp", "cat", "create", "delete")
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
  position = arguments.index("scp")
  source = pathlib.Path(arguments[position + 1])
  target = arguments[position + 2].partition(":")[2]
  if target.startswith("/"):  # all workers are on this machine
    return 0
  if source.is_dir() and "--recurse" not in arguments:
    print(f"{source}: not a regular file", file=sys.stderr)
    return 1
  for home in (folder / "workers").iterdir():
    copy(source, home / target)
  return 0


def cp(folder: pathlib.Path, arguments: list[str], event: str) -> int:
  *_, source, target = arguments
  copy(folder / "buckets" / source.removeprefix("gs://"), pathlib.Path(target))
  return 0


def copy(source: pathlib.Path, target: pathlib.Path) -> None:
  """Copies into the target if it is a folder, as scp does, or to that name."""
  if target.is_dir():
    target = target / source.name
  if source.is_dir():
    shutil.copytree(source, target, dirs_exist_ok=True)
  else:
    shutil.copy(source, target)


def ssh(folder: pathlib.Path, arguments: list[str], event: str) -> int:
  command = next(a for a in arguments if a.startswith("--command="))
  command = command.removeprefix("--command=")
  if "-m uv" in command:  # installing is not simulated
    return 0
  worst = 0
  is_all = "--worker=all" in arguments
  for home in sorted((folder / "workers").iterdir())[: None if is_all else 1]:
    path = f"{folder / 'bin'}:/usr/bin:/bin"
    environment = {"HOME": str(home), "PATH": path}
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
  size = next((a[9:] for a in arguments if a.startswith("--range=-")), "0")
  print(path.read_text()[-int(size) :], end="")
  return 0


if __name__ == "__main__":
  sys.exit(main(pathlib.Path(sys.argv[1]), sys.argv[2:]))
