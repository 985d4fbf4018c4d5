"""Masked item modeling and masked language modeling: a window of a user's items with something missing."""

import numpy as np

from recalign_jax.corpus.catalog import EOS_ID
from seqio_tasks import examples, writing
from seqio_tasks.span_corruption import corrupt_spans
from seqio_tasks.specs import TaskSpec
from seqio_tasks.writing import Limits, Sample


def num_windows(spec: TaskSpec, split: str) -> int:
    return examples.num_windows(spec.corpus, split)


def _window(spec: TaskSpec, split: str, index: int, random: np.random.Generator) -> np.ndarray:
    """Items of a user: any window of the training part, or the newest one with the held-out target."""
    user, end = examples.window_end(spec.corpus, split, index)
    length = min(end, spec.options.history_length)
    start = int(random.integers(end - length + 1)) if split == "train" else end - length
    return spec.corpus.sequence(user)[start : start + length]


def mim(spec: TaskSpec, split: str, index: int, random: np.random.Generator, limits: Limits) -> Sample:
    """A window of the user's items with some masked; the targets are the masked items in order.

    Held-out splits always mask their own target item, the newest of the window, so that their loss is of an
    item that no training sample holds.
    """
    wording = writing.draw_wording(spec, split, random)
    window = _window(spec, split, index, random)
    masked = _masks(spec, split, len(window), random)
    words = writing.words_of(spec)
    masked = _fitting_masks(spec, window, masked, limits.targets)
    items = [spec.displays.of(item) for item in window]
    lengths = [len(words.masked_item) if hide else len(item) for item, hide in zip(items, masked, strict=True)]
    lengths[-1] = max(len(words.masked_item), len(items[-1]))  # it may yet be masked
    kept = slice(writing.num_dropped(words, lengths, limits.inputs - words.sizes["mim"][wording]), None)
    window, masked, items = window[kept], masked[kept], items[kept]
    if not masked.any():
        masked[-1] = True  # the masked items were all among those that had to go
    items = [words.masked_item if hide else item for item, hide in zip(items, masked, strict=True)]
    return Sample(writing.prompt(spec, wording, items, limits.inputs), writing.target(spec, window[masked]))


def _masks(spec: TaskSpec, split: str, length: int, random: np.random.Generator) -> np.ndarray:
    """Which items of a window are masked, bool [length]: at least one and, of two or more in training, not all."""
    if spec.options.mim_masked_items is None:
        masked = random.random(length) < spec.options.mim_mask_rate
    else:
        masked = np.zeros(length, bool)
        count = min(spec.options.mim_masked_items, max(length - 1, 1))
        certain = 0 if split == "train" else 1  # the held-out item
        masked[random.permutation(length - certain)[: count - certain]] = True
    if split != "train":
        masked[-1] = True
    elif not masked.any():
        masked[random.integers(length)] = True
    elif masked.all() and length > 1:
        masked[random.integers(length)] = False
    return masked


def _fitting_masks(spec: TaskSpec, window: np.ndarray, masked: np.ndarray, limit: int) -> np.ndarray:
    """Unmasks the oldest of the masked items until what remains can be answered in `limit` tokens."""
    separator = len(writing.words_of(spec).separator)
    lengths = np.where(masked, spec.catalog.lengths[window] - 1 + separator, 0)
    # The last separator is none, the end of sequence is one token.
    from_newest = np.cumsum(lengths[::-1])[::-1] - separator + 1
    fitting = masked & (from_newest <= limit)
    fitting[np.flatnonzero(masked)[-1]] = True
    return fitting


def shortest_mim(spec: TaskSpec) -> dict[str, int]:
    item = max(spec.displays.longest, len(writing.words_of(spec).masked_item))
    return {"inputs": writing.question_size(spec) + item, "targets": int(spec.catalog.lengths.max())}


def mlm(spec: TaskSpec, split: str, index: int, random: np.random.Generator, limits: Limits) -> Sample:
    """The text of a window's items with spans replaced by sentinels; the targets are the spans, each after its own."""
    wording = writing.draw_wording(spec, split, random)
    window = _window(spec, split, index, random)
    words = writing.words_of(spec)
    items = [spec.displays.of(item) for item in window]
    room = limits.inputs - words.sizes["mlm"][wording]
    items = items[writing.num_dropped(words, [len(item) for item in items], room) :]
    # Text, unlike an item that is to be known again, may be cut: of a newest item that alone is too long, the end.
    tokens = np.concatenate(writing.joined(words, items))[:room]
    text, spans = corrupt_spans(
        tokens,
        spec.options.mlm_noise_density,
        spec.options.mlm_mean_span_length,
        limits.targets - 1,
        spec.vocabulary.num_tokens - 1,
        random,
    )
    return Sample(writing.prompt(spec, wording, [text], limits.inputs), np.append(spans, np.int32(EOS_ID)))


def shortest_mlm(spec: TaskSpec) -> dict[str, int]:
    return {"inputs": writing.question_size(spec) + 1, "targets": 3}
