"""Start, logging and end of every command.

A mistake of the user gives one message and exit code 1; `--debug` also shows
the traceback. This module imports nothing slow, so `--help` answers at once.
"""

from collections.abc import Callable
import contextlib
import copy
import logging
import sys

from absl import app, flags
from absl import logging as absl_logging

# Errors that a config, data, a workdir or a machine causes. Any other exception
# is a fault of the code, and shows its traceback.
_MISTAKES = (
  ValueError,
  OSError,
  RuntimeError,
  FloatingPointError,
  ImportError,
)


# Loggers of our own modules; "__main__" is the one that was started.
_OURS = ("dpo_jax", "experiments", "__main__")


class _Lines(logging.Handler):
  """Writes a line above the progress bars of a terminal.

  A line that cannot be written is lost: no log may stop a run. Orbax even takes
  an error in a log call for the end of a save that has failed, and commits it.
  """

  def emit(self, record: logging.LogRecord) -> None:
    from tqdm import tqdm  # only needed here

    line = self.format(record)
    with contextlib.suppress(OSError, ValueError):  # full, or closed
      tqdm.write(line, file=sys.stderr)


class _Format(logging.Formatter):
  """Formats the message, with the time if stderr is not a terminal.

  Tracebacks of libraries are left out without --debug: Orbax logs one of 400
  lines for each array that a full disk does not take.
  """

  def __init__(self, host: str):
    stamp = "" if sys.stderr.isatty() else "%(asctime)s "
    super().__init__(f"{stamp}{host}%(kind)s%(message)s", "%Y-%m-%d %H:%M:%S")

  def format(self, record: logging.LogRecord) -> str:
    record = copy.copy(record)  # other handlers have theirs
    is_warning = record.levelno > logging.INFO
    record.kind = f"{record.levelname.lower()}: " if is_warning else ""
    if not _is_debug():
      record.exc_info = record.exc_text = None
    return super().format(record)


def show_logs(process_index: int = 0) -> None:
  """Shows our log on stderr, and warnings of other libraries.

  Args:
    process_index: index of this process; those above 0 show only warnings, with
      the host.
  """
  is_first = process_index == 0
  root = logging.getLogger()
  for handler in list(root.handlers):
    if isinstance(handler, _Lines | absl_logging.ABSLHandler):
      root.removeHandler(handler)
  handler = _Lines()
  handler.setFormatter(_Format("" if is_first else f"host {process_index}: "))
  root.addHandler(handler)
  root.setLevel(logging.WARNING)
  # Orbax logs by it.
  absl_logging.set_verbosity(absl_logging.WARNING)
  for name in _OURS:
    level = logging.INFO if is_first else logging.WARNING
    logging.getLogger(name).setLevel(level)


def define_flags() -> None:
  """Defines the flags of every command."""
  flags.DEFINE_bool("debug", False, "show the traceback of an error")


def run(
  main: Callable[..., None],
  define: Callable[[], None] = lambda: None,
  *,
  takes_arguments: bool = False,
) -> None:
  """Parses the flags, runs a command, and ends the process.

  Args:
    main: the command; flags are parsed when it is called.
    define: defines flags that read the command line at once, as those of a
      config without a file do.
    takes_arguments: whether `main` is given the arguments without a flag.

  Raises:
    SystemExit: always: 0 after success; 1 after a mistake of the user, whose
      message is on stderr; 130 after Ctrl-C in a chat. With --debug the mistake
      itself is raised. Signals end the other commands: see `system.signals`.
  """
  if "debug" not in flags.FLAGS:
    define_flags()
  is_parsed = False

  def call(argv: list[str]) -> None:
    nonlocal is_parsed
    is_parsed = True
    show_logs()
    if takes_arguments:
      main(argv[1:])
      return
    if len(argv) > 1:
      raise ValueError(
        f"unexpected arguments: {' '.join(argv[1:])}. Flags are --NAME=VALUE"
      )
    main()

  try:
    define()
    app.run(call)
  except KeyboardInterrupt:
    raise SystemExit(130) from None  # as a shell reports it
  except _MISTAKES as error:
    _tell(error)
  except (AttributeError, KeyError, TypeError) as error:
    # Of ml_collections, for a flag such as --config.nonsense=1.
    if is_parsed:
      raise
    _tell(error)


def _is_debug() -> bool:
  return "--debug" in sys.argv or "--debug=true" in sys.argv


def _tell(error: BaseException) -> None:
  if _is_debug():
    raise error
  message = str(error) or type(error).__name__
  unknown = _unknown_keys(sys.argv[1:])
  if isinstance(error, AttributeError | KeyError | TypeError) and unknown:
    message = "\n".join(unknown)
  print(f"error: {message}\n(--debug shows where)", file=sys.stderr)
  raise SystemExit(1)


def _unknown_keys(argv: list[str]) -> list[str]:
  """Returns a line for each --config.KEY that does not exist."""
  # Imported here: only a mistake needs them.
  from dpo_jax.config import default_config, flatten
  from dpo_jax.names import did_you_mean

  known = [key for key, _ in flatten(default_config())]
  names = [
    argument[2:].partition("=")[0].removeprefix("config.")
    for argument in argv
    if argument.startswith("--config.")
  ]
  return [
    f"config.{name} is unknown.{did_you_mean(name, known)}"
    for name in names
    if name not in known
  ]
