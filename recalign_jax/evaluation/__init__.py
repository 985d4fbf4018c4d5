"""Evaluators of the recommendation tasks: one protocol for every model and baseline."""
