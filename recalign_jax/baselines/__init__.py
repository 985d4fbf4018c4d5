"""Conventional recommenders, under the same protocol."""
