"""Registration with SeqIO: every family of a corpus as a task, their mixtures in proportion to examples.

Importing this imports SeqIO and TensorFlow, which takes seconds.
"""

import functools
import os
from collections.abc import Mapping, Sequence

import numpy as np

from recalign_jax import terminal
from recalign_jax.corpus.catalog import ITEM_FORMATS
from recalign_jax.corpus.corpus import Corpus, corpora, data_dir_or_default, read_corpus
from recalign_jax.corpus.holdout import SPLITS
from recalign_jax.errors import InputError
from seqio_tasks import samples, scoring, specs, task_names, vocabulary, writing
from seqio_tasks.specs import TaskOptions, TaskSpec
from seqio_tasks.task_names import TaskName

with terminal.quiet_libraries():
    import seqio
    import tensorflow as tf

    # No accelerator memory for TensorFlow: it only moves token ids here.
    tf.config.set_visible_devices([], "GPU")
    tf.config.set_visible_devices([], "TPU")


class ItemVocabulary(seqio.SentencePieceVocabulary):
    """T5's vocabulary with item tokens on top; for SeqIO's features, which decode and need the size."""

    def __init__(self, spec: TaskSpec):
        super().__init__(spec.vocabulary.path, extra_ids=vocabulary.NUM_SENTINELS)
        self._spec = spec

    @property
    def _base_vocab_size(self) -> int:
        return self._spec.num_tokens  # SeqIO decodes what lies above as unknown

    def _decode(self, ids) -> str:
        return self._spec.vocabulary.decode(ids)

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        # TensorFlow's tokenizer fails on ids that it doesn't know, as item tokens.
        def decode(rows: np.ndarray) -> np.ndarray:
            texts = [self._decode(row) for row in rows.reshape(-1, rows.shape[-1]).tolist()]
            return np.asarray([text.encode() for text in texts], object).reshape(rows.shape[:-1])

        texts = tf.numpy_function(decode, [ids], tf.string)
        texts.set_shape(ids.shape[:-1])
        return texts

    def __eq__(self, other) -> bool:
        # A vocabulary of T5's without item tokens on top is SeqIO's own.
        return isinstance(other, seqio.SentencePieceVocabulary) and (self.sp_model, self.vocab_size) == (
            other.sp_model,
            other.vocab_size,
        )


class SampleSource(seqio.DataSource):
    """The examples of a task as indices, fully shuffled; `_render` writes them.

    Attributes:
      spec: the task; our trainer takes it from here and writes samples itself, by index arithmetic.
    """

    def __init__(self, spec: TaskSpec):
        self.spec = spec
        counts = {split: samples.num_examples(spec, split) for split in SPLITS}
        super().__init__(SPLITS, counts, caching_permitted=False, performs_internal_shuffling=True)

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return True

    def list_shards(self, split: str) -> Sequence[str]:
        return [split]

    def get_dataset(self, split="train", shuffle=True, seed=None, shard_info=None, **unused) -> tf.data.Dataset:
        """Indices of a split as `{"split": str, "index": int64}`."""
        del unused
        count = self.num_input_examples(split)
        dataset = tf.data.Dataset.range(count)
        if shard_info:
            dataset = dataset.shard(shard_info.num_shards, shard_info.index)
        if shuffle:
            dataset = dataset.shuffle(max(count, 1), seed=seed)
        return dataset.map(lambda index: {"split": tf.constant(split), "index": index})


def _render(dataset: tf.data.Dataset, sequence_length: Mapping[str, int] | None, spec: TaskSpec) -> tf.data.Dataset:
    limits = writing.NO_LIMITS
    if sequence_length:
        limits = writing.Limits(sequence_length["inputs"], sequence_length["targets"])

    def write(split: bytes, index: np.int64, seed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # SeqIO gives every example of every epoch a seed of its own, so the epoch is in it.
        return samples.render(spec, split.decode(), int(index), seed=int(seed[0]), limits=limits)

    @seqio.map_over_dataset(num_seeds=1)
    def write_example(example: Mapping[str, tf.Tensor], seed: tf.Tensor) -> Mapping[str, tf.Tensor]:
        inputs, targets = tf.numpy_function(write, [example["split"], example["index"], seed], (tf.int32, tf.int32))
        return {"inputs": tf.ensure_shape(inputs, [None]), "targets": tf.ensure_shape(targets, [None])}

    return write_example(dataset)


def register(corpus_dir: str | None = None, vocabulary_path: str | None = None) -> list[str]:
    """Registers the tasks and mixtures of prepared corpora with SeqIO, with the options that gin holds.

    Call it after gin is parsed. Registering again replaces what was there, so it may be called any number of times.

    Args:
      corpus_dir: the folder of a prepared corpus; None registers all corpora of $RECALIGN_DATA_DIR.
      vocabulary_path: a SentencePiece model in T5's layout; None takes $RECALIGN_VOCABULARY.

    Returns:
      The names registered.

    Raises:
      InputError: when there is no corpus or no vocabulary, or they don't fit.
    """
    words, options = vocabulary.load(vocabulary_path or os.environ.get("RECALIGN_VOCABULARY", "")), TaskOptions()
    if corpus_dir:
        return _register(read_corpus(corpus_dir), words, options)
    root = data_dir_or_default(None)
    names = corpora(root)
    if not names:
        raise InputError(f"No corpus in {root} (RECALIGN_DATA_DIR). Build one with `recalign prepare`.")
    return [task for name in names for task in _register(read_corpus(root / name), words, options)]


def _register(corpus: Corpus, words: vocabulary.Vocabulary, options: TaskOptions) -> list[str]:
    specs.warn_of_ratings(corpus)
    rated = specs.can_be_rated(corpus)
    names = []
    for item_format in ITEM_FORMATS:
        for family in task_names.families(rated):
            spec = specs.make_spec(corpus, family, item_format, words, options)
            feature = seqio.Feature(ItemVocabulary(spec), add_eos=True, dtype=tf.int32)
            seqio.TaskRegistry.remove(spec.name)
            seqio.TaskRegistry.add(
                spec.name,
                source=SampleSource(spec),
                preprocessors=[functools.partial(_render, spec=spec)],
                output_features={"inputs": feature, "targets": feature},
                postprocess_fn=scoring.postprocess_fn(spec),
                metric_fns=scoring.metric_fns(spec),
                shuffle_buffer_size=None,
            )
            names.append(spec.name)
        for base, members in task_names.mixtures(rated).items():
            name = TaskName((corpus.name,), base, item_format)
            names.append(_add_mixture(str(name), [name.of(corpus.name, family) for family in members], options))
    return names


def _add_mixture(name: str, tasks: Sequence[str], options: TaskOptions) -> str:
    rate = functools.partial(
        seqio.mixing_rate_num_examples, maximum=options.mixture_maximum, temperature=options.mixture_temperature
    )
    seqio.MixtureRegistry.remove(name)
    seqio.MixtureRegistry.add(name, [(task, rate) for task in tasks])
    return name
