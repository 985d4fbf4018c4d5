"""Rows of a table in random order, as batches of one shape."""

from collections.abc import Iterator, Mapping

import numpy as np


def shuffled(
    table: Mapping[str, np.ndarray], size: int, random: np.random.Generator
) -> Iterator[dict[str, np.ndarray]]:
    """Yields every row once, in random order.

    Args:
      table: columns of n > 0 rows.
      size: B, rows of a batch.
      random: what to draw from.

    Yields:
      The columns, each [B], and `weight`, float32 [B]: 1, or 0 for what fills up the last batch.
    """
    order = random.permutation(len(next(iter(table.values()))))
    weight = np.ones(size, np.float32)
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        weight[len(chosen) :] = 0
        chosen = np.resize(chosen, size)
        yield {name: column[chosen] for name, column in table.items()} | {"weight": weight.copy()}
