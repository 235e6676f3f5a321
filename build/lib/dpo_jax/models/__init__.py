"""Policy: Flax decoder, log-probs, sampling and checkpoints."""
