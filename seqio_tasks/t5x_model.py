"""What a T5X model takes from the task that it is trained on: the vocabulary, and how many rows that needs.

gin files of T5X import this, so it registers nothing until T5X builds the model, when gin is parsed.
"""

import importlib
from typing import Any

from seqio_tasks.vocabulary import embedding_rows


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
    """Rows of the embedding: as recalign_jax has them, so that parameters have the same shapes."""
    return embedding_rows(vocabulary(mixture_or_task_name, module).vocab_size)
