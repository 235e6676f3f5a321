"""The policy: a Flax decoder, its log-probs, sampling and checkpoints."""
