"""Hashes of parameters by which a change of a single bit shows, the same however arrays lie over devices."""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from recalign_jax.checkpoint import stacking


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths, as `params/encoder/encoder_norm/scale`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def fingerprints(tree: Any) -> dict[str, int]:
    """A hash of every array of a nested dict (or NamedTuple, ...) by its path; elements have four bytes each.

    It is computed where the arrays are: every device reads its own part, whatever the number of processes.
    """
    return {path: int(value) for path, value in jax.device_get(_hashes(by_path(tree))).items()}


def one_by_one(flat: Mapping[str, Any]) -> dict[str, int]:
    """`fingerprints` of arrays by path, of which each is read when its turn comes."""
    return {path: fingerprints({path: jnp.asarray(leaf)})[path] for path, leaf in flat.items()}


def fingerprint(params: Any) -> str:
    """One hash of all parameters, their names and shapes; those that are still on disk are read one by one."""
    flat = stacking.flatten(params)
    hashes = one_by_one(flat)
    text = "".join(f"{path} {flat[path].shape} {hashes[path]}\n" for path in sorted(flat))
    return hashlib.sha256(text.encode()).hexdigest()


@jax.jit
def _hashes(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {path: _hash(leaf) for path, leaf in leaves.items()}


def _hash(leaf: jax.Array) -> jax.Array:
    """The sum modulo 2 ** 32 of all elements' bits, each times an odd number that is its place's.

    An odd factor has an inverse, so that no change of one element goes unseen.
    """
    place = jnp.zeros(leaf.shape, jnp.uint32)
    for axis in range(leaf.ndim):
        place = place * jnp.uint32(0x9E3779B1) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    place = (place ^ (place >> 15)) * jnp.uint32(0x85EBCA77)
    bits = jax.lax.bitcast_convert_type(leaf, jnp.uint32)
    return jnp.sum(bits * (place << 1 | 1), dtype=jnp.uint32)
