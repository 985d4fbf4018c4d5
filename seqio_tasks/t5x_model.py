"""What a T5X model takes from the task that it is trained on: the vocabulary, and how many rows that needs.

gin files of T5X import this, so it registers nothing until T5X builds the model, when gin is parsed.
"""

import importlib
from typing import Any

ROW_MULTIPLE = 128  # as in recalign_jax.commands.common: parameters then have the same shapes


def vocabulary(mixture_or_task_name: str, module: str) -> Any:
    """The SeqIO vocabulary of a task's targets, item tokens included.

    Args:
      mixture_or_task_name: as T5X is given it.
      module: the Python module that registers it.
    """
    import seqio

    importlib.import_module(module)
    return seqio.get_mixture_or_task(mixture_or_task_name).output_features["targets"].vocabulary


def vocab_size(mixture_or_task_name: str, module: str) -> int:
    """Rows of the embedding: the entries of the vocabulary, rounded up to a multiple of 128."""
    entries = vocabulary(mixture_or_task_name, module).vocab_size
    return -(-entries // ROW_MULTIPLE) * ROW_MULTIPLE
