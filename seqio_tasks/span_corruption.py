"""Span corruption: masked language modeling as T5 does it."""

import numpy as np

from seqio_tasks.vocabulary import NUM_SENTINELS


def corrupt_spans(
    tokens: np.ndarray,
    noise_density: float,
    mean_span_length: float,
    limit: int,
    first_sentinel: int,
    random: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """T5's span corruption (Raffel et al. 2020, section 3.1.4), except that a span may begin with the first token.

    Args:
      tokens: int32 [n], n >= 1.
      noise_density: share of the tokens that is masked; at least one token is.
      mean_span_length: of the masked spans.
      limit: most tokens of the target, at least 2; less is masked until it fits.
      first_sentinel: of the first span; each further one has the number before.
      random: what to draw from.

    Returns:
      (tokens with each span replaced by its sentinel; each sentinel followed by its span), int32.
    """
    size = len(tokens)
    noise = min(max(round(size * noise_density), 1), size)
    spans = min(max(round(noise / mean_span_length), 1), NUM_SENTINELS, noise, size - noise + 1)
    if noise + spans > limit:
        spans = max(min(spans, limit // 2), 1)
        noise = max(limit - spans, 1)
    # Spans hold a token at least; so do the gaps between them, but not the one before and the one after.
    span_lengths = _composition(noise - spans, spans, random) + 1
    gaps = _composition(size - noise - (spans - 1), spans + 1, random)
    gaps[1:-1] += 1
    starts = np.cumsum(gaps[:-1]) + np.cumsum(span_lengths) - span_lengths
    sentinels = (first_sentinel - np.arange(spans)).astype(np.int32)
    masked = np.repeat(sentinels, span_lengths)
    places = np.repeat(starts - (np.cumsum(span_lengths) - span_lengths), span_lengths) + np.arange(noise)
    corrupted = tokens.copy()
    corrupted[places] = masked
    kept = np.ones(size, bool)
    kept[places] = False
    kept[starts] = True
    return corrupted[kept], np.insert(tokens[places], np.cumsum(span_lengths) - span_lengths, sentinels)


def _composition(total: int, parts: int, random: np.random.Generator) -> np.ndarray:
    """A uniformly drawn way to write `total` as a sum of `parts` numbers from zero on: int64 [parts]."""
    bars = np.sort(random.choice(total + parts - 1, parts - 1, replace=False))
    return np.diff(np.concatenate([[-1], bars, [total + parts - 1]])) - 1
