"""recalign_jax: turns FLAN-T5 into a recommender, in JAX, on TPU, GPU and CPU."""

__version__ = "0.1.0"
