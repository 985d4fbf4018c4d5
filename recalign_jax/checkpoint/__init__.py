"""Checkpoints: training checkpoints of our own, and readers for Hugging Face and T5X formats."""
