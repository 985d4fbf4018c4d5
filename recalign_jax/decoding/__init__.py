"""Catalogue trie, constrained beam search, sequence likelihood. Knows token sequences, not recommendation."""
