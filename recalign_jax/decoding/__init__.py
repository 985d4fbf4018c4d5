"""Catalogue trie, constrained beam search, likelihoods of candidates. Knows token sequences, not recommendation."""
