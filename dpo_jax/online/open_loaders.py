"""Loaders of a run: from its data, or sampled from its policy."""

from dpo_jax.data.loader import Loader
from dpo_jax.online.loader import OnPolicyLoader
from dpo_jax.training import cached_reference, initial_state
from dpo_jax.training.setup import Run
from dpo_jax.types import TrainState


def open_loaders(
  run: Run, state: TrainState, *, label: str
) -> tuple[Loader | OnPolicyLoader, dict[str, Loader]]:
  """Opens the training batches and the held-out sets that are measured.

  Args:
    run: run to train.
    state: first state, or that of the latest checkpoint; on the mesh.
    label: name of the reference's scoring for `progress.track`.

  Returns:
    The training loader, sampled from the policy unless `online.kind` is "none";
    and held-out loaders by name. Loaders of the data have the reference's
    log-probs, if the reference is cached.

  Raises:
    ValueError: see `cached_reference.attach`, which has other errors too, and
      `OnPolicyLoader`.
  """
  loaders = {n: x for n, x in run.data.eval.items() if n in run.data.measured}
  if run.config.online.kind == "none":
    attached = cached_reference.attach(
      run, state, [run.data.train, *loaders.values()], label=label
    )
    return attached[0], dict(zip(loaders, attached[1:], strict=True))
  sampled = OnPolicyLoader(
    run.config,
    run.workdir,
    run.data.train,
    program=run.program,
    ref_params=initial_state.load_params(run, run.reference_init),
    tokenizer=run.data.tokenizer,
    judge=run.online_judge,
  )
  attached = cached_reference.attach(
    run,
    state,
    list(loaders.values()),
    unscored=run.data.train,
    label=label,
  )
  return sampled, dict(zip(loaders, attached, strict=True))
