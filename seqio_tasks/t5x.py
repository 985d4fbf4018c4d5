"""Registers the tasks and mixtures of all prepared corpora when it is imported: T5X's MIXTURE_OR_TASK_MODULE.

They come from RECALIGN_DATA_DIR, their tokens from RECALIGN_VOCABULARY, their options from gin. T5X imports
this once it has parsed gin; a gin file must not import it, for then the options below the import come too late.
"""

import seqio_tasks

NAMES = seqio_tasks.register()
