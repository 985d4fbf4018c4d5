"""Prompts, samples, and their registration as SeqIO tasks and mixtures.

`seqio_tasks.register(corpus_dir, vocabulary)` registers those of a prepared corpus. The rest of the package
needs neither SeqIO nor TensorFlow, which take seconds to import.
"""


def register(corpus_dir: str | None = None, vocabulary: str | None = None) -> list[str]:
    """Registers prepared corpora with SeqIO and returns the names; see `seqio_tasks.tasks.register`."""
    from seqio_tasks import tasks

    return tasks.register(corpus_dir, vocabulary)
