"""Packing against a plain Python oracle: every sample once, whole, apart from its neighbours, and rightly weighed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recalign_jax.training import input_pipeline, packing
from seqio_tasks import specs, task_names
from seqio_tasks.components import CorpusTask
from seqio_tasks.specs import TaskOptions


def naive_first_fit_decreasing(sizes: list[tuple[int, int]], capacity: tuple[int, int]) -> list[int]:
    """The row of each sample, over Python lists; larger first by the larger share of a row, ties in order."""
    rows: list[list[int]] = []
    row_of = [-1] * len(sizes)
    share = [max(size[0] / capacity[0], size[1] / capacity[1]) for size in sizes]
    for sample in sorted(range(len(sizes)), key=lambda i: (-share[i], i)):
        size = sizes[sample]
        number = next((n for n, free in enumerate(rows) if free[0] >= size[0] and free[1] >= size[1]), len(rows))
        if number == len(rows):
            rows.append(list(capacity))
        rows[number][0] -= size[0]
        rows[number][1] -= size[1]
        row_of[sample] = number
    return row_of


@st.composite
def windows(draw):
    """(inputs, targets, tasks, L, T): samples of tokens above 0 that each fit into a row."""
    length, target_length = draw(st.integers(1, 40)), draw(st.integers(1, 20))
    sizes = draw(st.lists(st.tuples(st.integers(1, length), st.integers(1, target_length)), max_size=40))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    inputs = [random.integers(1, 1000, size[0]).astype(np.int32) for size in sizes]
    targets = [random.integers(1, 1000, size[1]).astype(np.int32) for size in sizes]
    return inputs, targets, random.integers(0, 3, len(sizes)), length, target_length


def segments(rows: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """What each segment of each row holds; checks that it is contiguous, and in the same order on both sides."""
    found = []
    for row in range(len(rows["encoder_input_tokens"])):
        sides = rows["encoder_segment_ids"][row], rows["decoder_segment_ids"][row]
        count = sides[0].max()
        for ids in sides:
            real = ids[: np.count_nonzero(ids)]  # padding stands at the end
            assert (real > 0).all()
            assert (np.diff(real) >= 0).all()
            assert set(real.tolist()) == set(range(1, count + 1))
        for segment in range(1, count + 1):
            here = {"encoder": sides[0] == segment, "decoder": sides[1] == segment}
            found.append({name: values[row][here[name.split("_")[0]]] for name, values in rows.items()})
    return found


@settings(max_examples=200)
@given(window=windows(), normalization=st.sampled_from(packing.LOSS_NORMALIZATIONS))
def test_every_sample_stands_in_one_row(window, normalization):
    inputs, targets, tasks, length, target_length = window
    rows = packing.pack(inputs, targets, tasks, length, target_length, normalization)
    number = len(rows["encoder_input_tokens"])
    for name, values in rows.items():
        assert values.shape == (number, length if name.startswith("encoder") else target_length)
        assert values.dtype == (np.float32 if name == "decoder_loss_weights" else np.int32)
        padding = rows[f"{name.split('_')[0]}_segment_ids"] == 0
        assert (values[padding] == 0).all()

    def key(tokens: np.ndarray, answer: np.ndarray, task: int) -> tuple:
        return tuple(tokens.tolist()), tuple(answer.tolist()), int(task)

    found = []
    for segment in segments(rows):
        answer = segment["decoder_target_tokens"]
        np.testing.assert_array_equal(segment["decoder_input_tokens"], [0, *answer[:-1]])
        assert len(set(segment["decoder_task_ids"].tolist())) == 1
        weight = 1 / len(answer) if normalization == "samples" else 1
        np.testing.assert_allclose(segment["decoder_loss_weights"], weight, rtol=1e-6)
        found.append(key(segment["encoder_input_tokens"], answer, segment["decoder_task_ids"][0]))
    assert sorted(found) == sorted(map(key, inputs, targets, tasks))
    total = len(inputs) if normalization == "samples" else sum(map(len, targets))
    assert rows["decoder_loss_weights"].sum(dtype=np.float64) == pytest.approx(total, rel=1e-6)


@settings(max_examples=200)
@given(window=windows())
def test_rows_are_those_of_first_fit_decreasing(window):
    inputs, targets, _, length, target_length = window
    sizes = list(zip(map(len, inputs), map(len, targets), strict=True))
    row_of = packing.assign_rows(np.asarray(sizes, np.int64).reshape(-1, 2), np.asarray([length, target_length]))
    assert row_of.tolist() == naive_first_fit_decreasing(sizes, (length, target_length))


def test_decoder_inputs_are_seqios():
    import seqio
    import tensorflow as tf

    random = np.random.default_rng(0)
    targets = [random.integers(1, 9, size).astype(np.int32) for size in random.integers(1, 9, 30)]
    rows = packing.pack(targets, targets, np.zeros(30, int), 16, 16, "tokens")
    assert rows["decoder_segment_ids"].max() > 2
    for row in range(len(rows["decoder_target_tokens"])):
        expected = seqio.autoregressive_inputs(
            tf.constant(rows["decoder_target_tokens"][row]), sequence_id=tf.constant(rows["decoder_segment_ids"][row])
        )
        np.testing.assert_array_equal(rows["decoder_input_tokens"][row], expected)


def test_no_samples_make_no_rows():
    rows = packing.pack([], [], np.zeros(0, int), 8, 4, "samples")
    assert {values.shape for values in rows.values()} == {(0, 8), (0, 4)}


@pytest.mark.parametrize("sizes", [(9, 1), (1, 5)])
def test_a_sample_longer_than_a_row_is_an_error(sizes):
    with pytest.raises(ValueError, match="doesn't fit into a row"):
        packing.pack([np.ones(sizes[0], int)], [np.ones(sizes[1], int)], np.zeros(1, int), 8, 4, "samples")


def test_rows_of_real_titles_are_full(beauty_corpus, t5_words):
    """Retrieval + MIM + MLM over titles at 512/128, as FLAN-T5 is fine-tuned."""
    families = task_names.MIXTURES["retrieval_aligned"]
    tasks = [CorpusTask(specs.make_spec(beauty_corpus, name, "title", t5_words, TaskOptions())) for name in families]
    options = input_pipeline.InputOptions(task_feature_lengths={"inputs": 512, "targets": 128})
    counts = np.asarray([131_413, 22_363, 22_363])
    components = list(zip(tasks, (counts / counts.sum()).tolist(), strict=True))
    stream = input_pipeline.make_stream(components, "train", 0, options)
    efficiency = [
        float((input_pipeline.pack_window(stream, window)["encoder_segment_ids"] > 0).mean()) for window in (0, 1, 50)
    ]
    assert min(efficiency) >= 0.92
