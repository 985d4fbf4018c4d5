"""The input pipeline: exact proportions, whole epochs, and batches that depend on nothing but (mixture, seed)."""

import dataclasses
import itertools
import threading
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recalign_jax.errors import InputError
from recalign_jax.training import input_pipeline, packing
from recalign_jax.training.input_pipeline import InputOptions, PackedBatches, Stream
from seqio_tasks import samples, specs
from seqio_tasks.components import Component, CorpusTask
from seqio_tasks.specs import TaskOptions
from seqio_tasks.writing import Limits

OPTIONS = InputOptions({"inputs": 256, "targets": 64}, batch_size=8, window=12, data_shards=4)
FEATURES = ("encoder_input_tokens", "encoder_segment_ids", "decoder_input_tokens", "decoder_target_tokens")


@pytest.fixture(scope="module")
def components(shop_corpus, shop_words) -> list[tuple[Component, float]]:
    families = ("retrieval", "mim")
    tasks = [CorpusTask(specs.make_spec(shop_corpus, name, "title", shop_words, TaskOptions())) for name in families]
    counts = np.asarray([task.num_examples("train") for task in tasks])
    return list(zip(tasks, (counts / counts.sum()).tolist(), strict=True))


@pytest.fixture(scope="module")
def stream(components) -> Stream:
    return input_pipeline.make_stream(components, "train", 11, OPTIONS)


def specs_of(stream: Stream) -> list[specs.TaskSpec]:
    return [task.spec for task in stream.tasks]


def take(stream: Stream, count: int, positions=None, part: int = 0, num_parts: int = 1):
    """The first batches and the positions after each."""
    start = input_pipeline.start_positions(stream.options) if positions is None else positions
    return list(itertools.islice(PackedBatches(stream, start, part, num_parts), count))


def assert_equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert set(one) == set(other)
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name], err_msg=name)


@pytest.fixture(scope="module")
def run(stream):
    """Sixteen batches: every shard goes through several windows."""
    found = take(stream, 16)
    assert found[-1][1][:, 0].max() >= 2 * stream.options.num_shards()
    return found


# Proportions.


@st.composite
def rates(draw) -> list[float]:
    """Rates of one to six tasks, the largest first, as `make_stream` orders them."""
    counts = draw(st.lists(st.integers(1, 10**6), min_size=1, max_size=6))
    return sorted((count / sum(counts) for count in counts), reverse=True)


@settings(max_examples=300)
@given(rates=rates(), n=st.integers(0, 10**12), window=st.integers(30, 5000))
def test_counts_are_exact(rates, n, window):
    counts, after = input_pipeline.counts_before(rates, n), input_pipeline.counts_before(rates, n + window)
    assert counts.dtype == np.int64
    assert counts.sum() == n
    assert (np.abs(counts - np.asarray(rates) * n) <= len(rates)).all()
    assert (after >= counts).all()  # from one window to the next; 30 = 6 * 5 samples are enough for six tasks


@settings(max_examples=100)
@given(share=st.floats(0.5, 1), n=st.integers(0, 10**9))
def test_counts_of_two_tasks_grow_with_every_sample(share, n):
    rates = [share, 1 - share]
    step = input_pipeline.counts_before(rates, n + 1) - input_pipeline.counts_before(rates, n)
    assert sorted(step.tolist()) == [0, 1]


def addresses(stream: Stream, windows: int) -> list[tuple[int, int, int]]:
    return [address for window in range(windows) for address in input_pipeline.addresses(stream, window)]


def test_every_window_has_its_samples(stream):
    for window in range(5):
        found = input_pipeline.addresses(stream, window)
        assert len(found) == stream.options.window
        assert all(isinstance(number, int) for address in found for number in address)


def test_every_epoch_sees_each_example_once(stream):
    found = addresses(stream, 240)
    seen = Counter(found)
    assert set(seen.values()) == {1}
    for task, component in enumerate(stream.tasks):
        count = component.num_examples("train")
        last = max(epoch for number, epoch, _ in found if number == task)
        assert last >= 2
        for epoch in range(last):  # the last one is still under way
            assert {index for number, e, index in found if (number, e) == (task, epoch)} == set(range(count))


def test_every_epoch_and_seed_has_an_order_of_its_own(stream):
    def order(stream: Stream, task: int, epoch: int) -> list[int]:
        return [index for number, e, index in addresses(stream, 160) if (number, e) == (task, epoch)]

    reseeded = dataclasses.replace(stream, seed=12)
    for task in range(len(stream.tasks)):
        orders = [order(stream, task, 0), order(stream, task, 1), order(reseeded, task, 0), order(reseeded, task, 1)]
        for one, other in itertools.combinations(orders, 2):
            assert len(one) > 40
            assert sum(a == b for a, b in zip(one, other, strict=True)) < len(one) / 4


# Batches.


def test_a_window_holds_its_samples(stream):
    limits = Limits(**OPTIONS.task_feature_lengths)
    for window in (0, 7):
        rows = input_pipeline.pack_window(stream, window)
        found = Counter()
        for row in range(len(rows["encoder_input_tokens"])):
            for segment in range(1, rows["encoder_segment_ids"][row].max() + 1):
                tokens = rows["encoder_input_tokens"][row][rows["encoder_segment_ids"][row] == segment]
                answer = rows["decoder_target_tokens"][row][rows["decoder_segment_ids"][row] == segment]
                task = rows["decoder_task_ids"][row][rows["decoder_segment_ids"][row] == segment][0]
                found[(tuple(tokens), tuple(answer), task)] += 1
        expected = Counter()
        for task, epoch, index in input_pipeline.addresses(stream, window):
            sample = samples.render(specs_of(stream)[task], "train", index, epoch, stream.seed, limits)
            expected[(tuple(sample.inputs), tuple(sample.targets), task)] += 1
        assert found == expected


def test_masks_of_a_later_epoch_are_new(stream):
    mim = next(number for number, spec in enumerate(specs_of(stream)) if spec.family == "mim")
    epochs = {epoch for number, epoch, _ in addresses(stream, 160) if number == mim}
    assert len(epochs) > 1
    users = np.flatnonzero(
        specs_of(stream)[mim].corpus.training_lengths[specs_of(stream)[mim].corpus.lengths > 10] > 10
    )[:10]
    same = [
        np.array_equal(
            samples.render(specs_of(stream)[mim], "train", int(user), 0, stream.seed).inputs,
            samples.render(specs_of(stream)[mim], "train", int(user), 1, stream.seed).inputs,
        )
        for user in users
    ]
    assert np.mean(same) < 0.5


def test_shards_are_read_window_by_window(stream, run):
    """A shard's rows in all batches are the rows of its windows, one after the other."""
    shards, rows = OPTIONS.num_shards(), OPTIONS.batch_size // OPTIONS.num_shards()
    for shard in range(shards):
        windows = [input_pipeline.pack_window(stream, window) for window in range(shard, 8 * shards, shards)]
        for name in FEATURES:
            expected = np.concatenate([window[name] for window in windows])
            found = np.concatenate([batch[name][shard * rows : (shard + 1) * rows] for batch, _ in run])
            np.testing.assert_array_equal(found, expected[: len(found)])


@pytest.mark.parametrize("num_parts", [2, 4])
def test_batches_do_not_depend_on_the_number_of_processes(stream, run, num_parts):
    parts = [take(stream, 6, part=part, num_parts=num_parts) for part in range(num_parts)]
    for number, (batch, positions) in enumerate(run[:6]):
        own = [part[number] for part in parts]
        assert_equal(batch, {name: np.concatenate([piece[name] for piece, _ in own]) for name in batch})
        np.testing.assert_array_equal(positions, np.concatenate([where for _, where in own]))


@settings(max_examples=25)
@given(k=st.integers(1, 13), num_parts=st.sampled_from([1, 2]))
def test_resuming_after_any_batch_goes_on_exactly(stream, run, k, num_parts):
    positions = run[k - 1][1]
    parts = [take(stream, 3, positions, part, num_parts) for part in range(num_parts)]
    for number in range(3):
        batch = {name: np.concatenate([part[number][0][name] for part in parts]) for name in FEATURES}
        assert_equal({name: run[k + number][0][name] for name in FEATURES}, batch)
        np.testing.assert_array_equal(run[k + number][1], np.concatenate([part[number][1] for part in parts]))


def test_another_seed_gives_other_batches(stream, run):
    [(batch, _)] = take(dataclasses.replace(stream, seed=12), 1)
    assert not np.array_equal(batch["encoder_input_tokens"], run[0][0]["encoder_input_tokens"])


@pytest.mark.parametrize("seed", [-1, 2**32 - 1])
def test_any_seed_will_do(components, seed):
    batches = take(input_pipeline.make_stream(components, "train", seed, OPTIONS), 1)
    assert batches[0][0]["decoder_loss_weights"].sum() > 0


def test_worker_processes_give_the_same_batches(components):
    options = dataclasses.replace(OPTIONS, data_shards=1)
    one, other = (
        take(input_pipeline.make_stream(components, "train", 0, dataclasses.replace(options, workers=workers)), 12)
        for workers in (0, 1)
    )
    assert other[-1][1][0, 0] > 1
    for (batch, positions), (expected, where) in zip(other, one, strict=True):
        assert_equal(batch, expected)
        np.testing.assert_array_equal(positions, where)


def test_first_windows_are_rendered_one_at_a_time_while_nobody_waits(components, monkeypatch):
    """A training compiles meanwhile; several at once would take the interpreter from it."""
    begun, may_go_on, rendering = threading.Semaphore(0), threading.Event(), []
    real = CorpusTask.render

    def render(self, *arguments):
        rendering.append(threading.get_ident())
        begun.release()
        assert may_go_on.wait(60)
        return real(self, *arguments)

    monkeypatch.setattr(CorpusTask, "render", render)
    stream = input_pipeline.make_stream(components, "train", 11, OPTIONS)
    batches = PackedBatches(stream, input_pipeline.start_positions(OPTIONS))  # returns, though nothing can be rendered
    assert begun.acquire(timeout=60)
    assert not begun.acquire(timeout=0.2)
    may_go_on.set()
    batch, _ = next(batches)
    assert len(batch["encoder_input_tokens"]) == OPTIONS.batch_size
    so_far = list(rendering)
    assert len(so_far) >= OPTIONS.data_shards * OPTIONS.window
    turns = [len(list(turn)) for _, turn in itertools.groupby(so_far)]
    # Each goes through a whole window before the next begins. A shard's thread may have two turns one after the other,
    # and the last is under way.
    assert not any(length % OPTIONS.window for length in turns[:-1])
    assert threading.get_ident() not in so_far


def test_what_nobody_waits_for_is_not_rendered(components, monkeypatch):
    """Python waits for its threads: a start that fails would end when all first windows are there."""
    begun, may_go_on, done, rendered = threading.Event(), threading.Event(), threading.Semaphore(0), []
    pack, in_turn = input_pipeline.pack_window, input_pipeline._in_turn

    def pack_window(stream, window):
        begun.set()
        assert may_go_on.wait(60)
        rendered.append(window)
        return pack(stream, window)

    def in_turn_and_told(*arguments):
        found = in_turn(*arguments)
        done.release()
        return found

    monkeypatch.setattr(input_pipeline, "pack_window", pack_window)
    monkeypatch.setattr(input_pipeline, "_in_turn", in_turn_and_told)
    stream = input_pipeline.make_stream(components, "train", 11, OPTIONS)
    batches = PackedBatches(stream, input_pipeline.start_positions(OPTIONS))
    assert begun.wait(60)
    del batches
    may_go_on.set()
    assert all(done.acquire(timeout=60) for _ in range(OPTIONS.data_shards))
    assert len(rendered) == 1


@pytest.mark.parametrize("split", ["validation", "test"])
def test_held_out_splits_stream_too(components, split):
    stream = input_pipeline.make_stream(components, split, 0, OPTIONS)
    found = [address for address in addresses(stream, 40) if address[1] == 0]
    assert {index for task, _, index in found if task == 0} == set(range(stream.tasks[0].num_examples(split)))
    assert take(stream, 1)[0][0]["decoder_loss_weights"].sum() > 0


def test_the_largest_task_comes_first(components):
    for order in (components, components[::-1]):
        stream = input_pipeline.make_stream(order, "train", 0, OPTIONS)
        assert [spec.family for spec in specs_of(stream)] == ["retrieval", "mim"]
        assert stream.rates == tuple(sorted((rate for _, rate in components), reverse=True))


def test_shards_by_default():
    assert [InputOptions(batch_size=size).num_shards() for size in (1, 6, 8, 32, 100)] == [1, 2, 8, 8, 4]


def test_another_number_of_shards_repeats_no_sample(stream):
    """RESUME_CHANGED with another BATCH_SIZE: what is read after it wasn't read before."""
    done = take(stream, 5)
    before = done[-1][1]
    size = stream.options.window
    assert input_pipeline.resumed_positions(stream.options, before, size).tolist() == before.tolist()
    for shards in (1, 2, 3, 8):
        options = dataclasses.replace(stream.options, data_shards=shards)
        positions = input_pipeline.resumed_positions(options, before, size)
        windows = positions[:, 0]
        assert positions.shape == (shards, 2)
        assert not positions[:, 1].any()
        # Each shard has its windows, and none that was begun; the first ones after these.
        assert (windows % shards).tolist() == list(range(shards))
        assert sorted(windows) == list(range(before[:, 0].max() + 1, before[:, 0].max() + 1 + shards))


@pytest.mark.parametrize("window", [5, 6, 13, 24, 1000])
def test_another_window_repeats_no_sample(stream, window):
    """A window's number means other samples then: what goes on begins behind all that were begun, and not far."""
    before = take(stream, 5)[-1][1]
    options = dataclasses.replace(stream.options, window=window)
    begun = (before[:, 0].max() + 1) * stream.options.window
    first = window * input_pipeline.resumed_positions(options, before, stream.options.window)[:, 0].min()
    assert begun <= first < begun + window


# Bad input.


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": 0}, "BATCH_SIZE 0"),
        ({"batch_size": 6}, "BATCH_SIZE 6 is no multiple of the 4 data shards"),
        ({"data_shards": 0}, "data shards"),
        ({"data_shards": -1}, "data shards"),
        ({"window": 0}, "window of 0"),
        ({"loss_normalization": "sample"}, "LOSS_NORMALIZATION is 'sample'"),
        ({"window": 1}, r"--gin\.InputOptions\.window=2, or more"),
        ({"batch_size": 8.0}, r"InputOptions\.batch_size is 8\.0: must be a whole number\."),
        ({"workers": True}, r"InputOptions\.workers is True: must be a whole number\."),
        ({"data_shards": "4"}, r"InputOptions\.data_shards is '4': must be a whole number or None\."),
        ({"task_feature_lengths": None}, r"task_feature_lengths is None: must be a mapping\."),
        ({"task_feature_lengths": {"inputs": 256, "targets": "64"}}, "TASK_FEATURE_LENGTHS targets is '64'"),
        ({"task_feature_lengths": {"inputs": 256}}, "must name inputs and targets"),
        ({"task_feature_lengths": {"inputs": 256, "targets": 64, "x": 1}}, "must name inputs and targets"),
        ({"task_feature_lengths": {"inputs": 20, "targets": 64}}, "inputs=20 is too short for shop_retrieval"),
        ({"task_feature_lengths": {"inputs": 256, "targets": 5}}, "targets=5 is too short for shop_retrieval"),
    ],
)
def test_options_that_do_not_fit(components, changed, message):
    with pytest.raises(InputError, match=message):
        input_pipeline.make_stream(components, "train", 0, dataclasses.replace(OPTIONS, **changed))


def test_rows_that_just_hold_one_sample_are_enough(components):
    needed = [task.shortest_row() for task, _ in components]
    lengths = {feature: max(row[feature] for row in needed) for feature in ("inputs", "targets")}
    options = dataclasses.replace(OPTIONS, task_feature_lengths=lengths)
    assert take(input_pipeline.make_stream(components, "train", 0, options), 2)
    for feature in lengths:
        short = dataclasses.replace(options, task_feature_lengths={**lengths, feature: lengths[feature] - 1})
        with pytest.raises(InputError, match=f"{feature}={lengths[feature] - 1} is too short"):
            input_pipeline.make_stream(components, "train", 0, short)


def test_more_processes_than_shards(stream):
    with pytest.raises(InputError, match=r"4 data shards can't be read in 3 parts.*data_shards=3"):
        take(stream, 1, num_parts=3)


def test_a_split_without_examples(components):
    spec = components[0][0].spec
    nobody = dataclasses.replace(spec.corpus, user_offsets=np.arange(10), items=spec.corpus.items[:9])
    with pytest.raises(InputError, match="has no train examples"):
        input_pipeline.make_stream([(CorpusTask(dataclasses.replace(spec, corpus=nobody)), 1.0)], "train", 0, OPTIONS)


def test_normalizations_reach_the_rows(components):
    for normalization in packing.LOSS_NORMALIZATIONS:
        options = dataclasses.replace(OPTIONS, loss_normalization=normalization)
        rows = input_pipeline.pack_window(input_pipeline.make_stream(components, "train", 0, options), 0)
        tokens = (rows["decoder_segment_ids"] > 0).sum()
        expected = OPTIONS.window if normalization == "samples" else tokens
        assert rows["decoder_loss_weights"].sum() == pytest.approx(expected, rel=1e-5)
