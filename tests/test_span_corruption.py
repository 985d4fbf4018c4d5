"""Span corruption: what is taken away comes back, and as much is taken as asked for."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from seqio_tasks.span_corruption import corrupt_spans

FIRST = 1099  # sentinels are 1000 to 1099


def put_back(text: list[int], spans: list[int]) -> list[int]:
    pieces: dict[int, list[int]] = {}
    for token in spans:
        if token >= 1000:
            pieces[token] = []
            last = token
        else:
            pieces[last].append(token)
    assert list(pieces) == [FIRST - n for n in range(len(pieces))]
    assert [token for token in text if token >= 1000] == list(pieces)
    assert all(pieces.values())
    return [token for place in text for token in (pieces[place] if place >= 1000 else [place])]


@settings(max_examples=500)
@given(
    size=st.integers(1, 600),
    density=st.floats(0, 1),
    mean=st.floats(1, 20),
    limit=st.integers(2, 300),
    seed=st.integers(0, 2**32 - 1),
)
def test_spans_can_be_put_back(size, density, mean, limit, seed):
    tokens = np.arange(size, dtype=np.int32) + 3
    text, spans = corrupt_spans(tokens, density, mean, limit, FIRST, np.random.default_rng(seed))
    assert text.dtype == spans.dtype == np.int32
    assert len(spans) <= limit
    assert put_back(text.tolist(), spans.tolist()) == tokens.tolist()
    noise = int((spans < 1000).sum())
    asked = min(max(round(size * density), 1), size)
    spans_asked = min(max(round(asked / mean), 1), 100, asked, size - asked + 1)
    if asked + spans_asked <= limit:
        assert (noise, len(spans)) == (asked, asked + spans_asked)
    else:  # the limit is made full use of, if need be by fewer spans
        assert (noise, len(spans)) == (limit - min(spans_asked, limit // 2), limit)
        assert noise <= asked
    # Two spans are never neighbours: they would be one.
    places = np.flatnonzero(text >= 1000)
    assert (np.diff(places) > 1).all()


def test_no_place_is_never_or_always_masked():
    counts = np.zeros(40)
    random = np.random.default_rng(0)
    for _ in range(4000):
        _, spans = corrupt_spans(np.arange(40, dtype=np.int32), 0.15, 3.0, 100, FIRST, random)
        counts[spans[spans < 1000]] += 1
    share = counts / 4000
    assert abs(share.mean() - 0.15) < 1e-9
    # Ends are a little rarer and their neighbours a little more frequent.
    assert share.min() > 0.04
    assert share.max() < 0.22
