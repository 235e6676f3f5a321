"""The faults that a run must survive or refuse, and what becomes of each.

Tests that provoke a fault are marked with its number: `pytest.mark.fault(39)`.
`python scripts/write_reliability.py` writes the table of docs/reliability.md.
"""

from typing import NamedTuple


class Fault(NamedTuple):
  """One fault: its number, what happens, and what the project does."""

  number: int
  fault: str
  outcome: str


FAULTS = (
  # Text and tokens.
  Fault(1, "a token straddles prompt and response", "encoded apart"),
  Fault(2, "the template writes a BOS too", "one BOS"),
  Fault(3, "the tokenizer adds a BOS to each part", "none inside"),
  Fault(4, "a response has no EOS", "one, and it is scored"),
  Fault(5, "a message spells an EOS or a role", "its letters are tokens"),
  Fault(6, "the padding token is the EOS", "changes nothing"),
  Fault(7, "a special token has id 0", "changes nothing"),
  Fault(
    8, "a cut would remove the response", "the prompt is cut first; counted"
  ),
  Fault(9, "two responses are equal after a cut", "dropped and counted"),
  Fault(10, "a cut takes the wrong end of a prompt", "its end is kept"),
  Fault(11, "an empty response", "dropped and counted"),
  Fault(12, "chosen and rejected are equal", "dropped and counted"),
  Fault(13, "responses share their opening", "both are kept whole"),
  Fault(14, "both responses are empty", "dropped and counted"),
  Fault(
    15, "an id beyond the vocabulary, or below 0", "refused; names the group"
  ),
  Fault(16, "a misspelt column", "refused; suggests the nearest"),
  Fault(17, "records of several formats in a file", "each is read as its own"),
  Fault(18, "a broken line, a cut file", "refused; names the line"),
  Fault(19, "roles that a template refuses", "refused; names the line"),
  Fault(20, "a prompt is rendered in two ways", "refused; shows both"),
  Fault(
    21, "duplicates; prompts that are held out too", "counted; split by prompt"
  ),
  Fault(22, "no usable group is left", "refused; says why"),
  # Numbers.
  Fault(23, "a softmax in bfloat16", "computed in float32"),
  Fault(24, "the log of a sigmoid of -200", "finite"),
  Fault(25, "an exponential overflows", "finite to 500 nats"),
  Fault(26, "a row of nothing but padding", "changes nothing"),
  Fault(27, "a mean over no tokens", "counts as one token"),
  Fault(28, "a masked branch has an infinite gradient", "finite gradients"),
  Fault(29, "a loss or parameter is not finite", "stops; is not saved"),
  Fault(30, "a gradient spikes", "skipped where asked for; counted"),
  Fault(31, "counters lose their last digits", "float64 on the host"),
  Fault(32, "the policy's buffers are the reference's", "loaded twice"),
  Fault(33, "the reference follows the policy unasked", "stays as it began"),
  Fault(34, "another reference after a resume", "refused"),
  Fault(35, "dropout in the reference", "there is no dropout"),
  Fault(36, "a stale or half-written cache", "not read"),
  Fault(37, "the policy does not start as its reference", "refused at step 0"),
  # Checkpoints and resumes.
  Fault(38, "another order of the data after a resume", "the same batches"),
  Fault(39, "kill -9, at any moment", "resumes; same bits"),
  Fault(40, "a bit of a checkpoint flips", "uses the step before"),
  Fault(41, "a file of a checkpoint is missing", "uses the step before"),
  Fault(42, "an empty, foreign or renamed step", "uses the step before"),
  Fault(43, "the disk is full", "the step before stays"),
  Fault(44, "a checkpoint of another model", "refused; names arrays"),
  Fault(45, "SIGTERM to one of two processes", "both save; exit code 75"),
  Fault(46, "a second SIGTERM; Ctrl-C", "ends at once; exit code 75"),
  Fault(47, "the clock runs backwards", "changes nothing"),
  Fault(48, "other config or data in a workdir", "refused; names it"),
  Fault(49, "two runs in one workdir", "the second is refused"),
  Fault(50, "a restart forgets the best step", "it is remembered"),
  Fault(51, "another number of devices", "resumes, but for rounding"),
  # Several hosts.
  Fault(52, "a host has fewer groups than the others", "same shapes on all"),
  Fault(53, "a host dies or freezes", "the others end and name it"),
  Fault(54, "hosts differ in config or data", "none starts; names it"),
  Fault(55, "a batch that devices do not divide", "refused; the nearest sizes"),
  Fault(56, "the last batch is smaller", "every group counts once"),
  Fault(57, "an error while reading is taken for the end", "raised"),
  Fault(58, "a mean is taken twice over hosts", "sums are divided once"),
  # Files from outside.
  Fault(59, "weights that are a pickle", "refused"),
  Fault(60, "a model that needs its own code", "refused; nothing runs"),
  Fault(61, "a chat template attacks or never ends", "refused; in a child"),
  Fault(62, "a damaged safetensors file, or NaN weights", "refused; names it"),
  Fault(63, "an index that points outside its folder", "refused"),
  Fault(
    64, "an archive that writes outside its folder", "no archive is unpacked"
  ),
  Fault(65, "a secret of the environment in a file", "none is written"),
)
# Cannot happen: what could cause it does not exist here.
NOT_APPLICABLE = frozenset({35, 64})
# Without a test so far. The aim is none.
NOT_YET: frozenset[int] = frozenset()
