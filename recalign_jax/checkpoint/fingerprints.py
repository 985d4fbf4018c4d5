"""Hashes of parameters by which a change of a single bit shows, the same however arrays lie over devices."""

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from recalign_jax.checkpoint import stacking

PART_BYTES = 2**26  # of an array that is read to be hashed


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
    """`fingerprints` of arrays by path; those that aren't on a device are read in parts along their first axis."""
    return {path: _in_parts(leaf) for path, leaf in flat.items()}


def _in_parts(leaf: Any) -> int:
    if isinstance(leaf, jax.Array) or not leaf.shape or 0 in leaf.shape:
        return fingerprints({"leaf": jnp.asarray(leaf)})["leaf"]
    rows, *others = leaf.shape
    size = max(1, PART_BYTES // (4 * math.prod(others)))
    rest = tuple(slice(0, other) for other in others)
    starts = range(0, rows, size)
    parts = (_hash_from(jnp.asarray(leaf[(slice(start, min(start + size, rows)), *rest)]), start) for start in starts)
    return sum(map(int, parts)) % 2**32


def fingerprint(params: Any) -> str:
    """One hash of all parameters, their names and shapes; those that are still on disk are read one by one."""
    flat = stacking.flatten(params)
    hashes = one_by_one(flat)
    text = "".join(f"{path} {flat[path].shape} {hashes[path]}\n" for path in sorted(flat))
    return hashlib.sha256(text.encode()).hexdigest()


@jax.jit
def _hashes(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {path: _hash(leaf) for path, leaf in leaves.items()}


def _hash(leaf: jax.Array, start: jax.Array | int = 0) -> jax.Array:
    """The sum modulo 2 ** 32 of all elements' bits, each times an odd number that is its place's.

    An odd factor has an inverse, so that no change of one element goes unseen. `start` is where the leaf begins along
    the first axis of the array that it is a part of: hashes of parts add up to that of the whole.
    """
    place = jnp.zeros(leaf.shape, jnp.uint32)
    for axis in range(leaf.ndim):
        place = place * jnp.uint32(0x9E3779B1) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        if axis == 0:
            place = place + jnp.uint32(start)
    place = (place ^ (place >> 15)) * jnp.uint32(0x85EBCA77)
    bits = jax.lax.bitcast_convert_type(leaf, jnp.uint32)
    return jnp.sum(bits * (place << 1 | 1), dtype=jnp.uint32)


_hash_from = jax.jit(_hash)
