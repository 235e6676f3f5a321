"""The error of a run whose metrics or parameters are not finite."""


class NonFiniteError(FloatingPointError):
  """A loss, gradient or log-prob is not a finite number."""
