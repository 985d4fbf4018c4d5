"""T5.1.1 in Flax NNX. Knows token sequences, nothing of recommendation."""
