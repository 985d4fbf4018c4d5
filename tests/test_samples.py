"""Samples: pure, complete, within their limits, and free of held-out items, against brute force on item numbers."""

import dataclasses
import gzip
import json
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recalign_jax.corpus.catalog import title_text
from recalign_jax.corpus.corpus import Corpus
from recalign_jax.errors import InputError
from seqio_tasks import prompts, samples, specs
from seqio_tasks.samples import Limits
from seqio_tasks.specs import TaskOptions, TaskSpec
from tests.shared_data import shared

EOS = 1
FAMILIES = specs.FAMILIES
ITEM_FORMATS = ("title", "token")


def training_part(sequence: list[int]) -> list[int]:
    return sequence[:-2] if len(sequence) >= 3 else sequence


def sequences(corpus: Corpus) -> list[list[int]]:
    return [corpus.sequence(user).tolist() for user in range(corpus.num_users)]


def all_prefix_pairs(corpus: Corpus) -> list[tuple[int, list[int], int]]:
    """Every (user, history, next item) of the training parts."""
    parts = [training_part(sequence) for sequence in sequences(corpus)]
    return [
        (user, part[:position], part[position]) for user, part in enumerate(parts) for position in range(1, len(part))
    ]


def held_out_users(corpus: Corpus) -> list[int]:
    return [user for user, sequence in enumerate(sequences(corpus)) if len(sequence) >= 3]


def mim_users(corpus: Corpus) -> list[int]:
    return [user for user, sequence in enumerate(sequences(corpus)) if len(training_part(sequence)) >= 2]


def numbered(spec: TaskSpec) -> TaskSpec:
    """The task with every token of item i replaced by a number of its own: lengths stay, and items can be read off."""
    catalog, base = spec.catalog, spec.vocabulary.num_tokens
    items = np.arange(catalog.num_items, dtype=np.int32)
    tokens = np.where(catalog.tokens > EOS, base + items[:, None], catalog.tokens)
    pieces = base + np.repeat(items, np.diff(catalog.piece_offsets))
    return dataclasses.replace(spec, catalog=dataclasses.replace(catalog, tokens=tokens, piece_tokens=pieces))


def separator_of(spec: TaskSpec) -> str:
    return prompts.ITEM_SEPARATORS[spec.catalog.item_format]


def read(spec: TaskSpec, sample: samples.Sample) -> tuple[list[int | None], list[int]]:
    """Reads a numbered sample: the items of the prompt (None where one is masked) and of the target.

    Checks on the way that the prompt is question, whole items with separators between, question, end of sequence.
    """
    encode, base, catalog = spec.vocabulary.encode, spec.vocabulary.num_tokens, spec.catalog
    before, after = (encode([part])[0] for part in prompts.TEMPLATES[spec.family] if part != prompts.HISTORY)
    separator, masked = encode([separator_of(spec)])[0], encode([prompts.MASKED_ITEM])[0]
    inputs, targets = sample.inputs.tolist(), sample.targets.tolist()
    assert inputs[: len(before)] == before
    assert inputs[-len(after) - 1 :] == [*after, EOS]
    assert targets[-1] == EOS

    def items(rest: list[int], length_of) -> list[int | None]:
        found: list[int | None] = []
        while rest:
            if found:
                assert rest[: len(separator)] == separator
                rest = rest[len(separator) :]
            if rest[: len(masked)] == masked:
                found.append(None)
                rest = rest[len(masked) :]
            else:
                found.append(rest[0] - base)
                length = length_of(rest[0] - base)
                assert rest[:length] == rest[:1] * length
                rest = rest[length:]
        return found

    window = items(inputs[len(before) : -len(after) - 1], lambda item: len(catalog.pieces(item)))
    answer = items(targets[:-1], lambda item: int(catalog.lengths[item]) - 1)
    return window, [item for item in answer if item is not None]


def fill(window: list[int | None], answer: list[int]) -> list[int]:
    """The window with the answer in the places of the masked items."""
    assert window.count(None) == len(answer)
    rest = iter(answer)
    return [next(rest) if item is None else item for item in window]


@pytest.fixture(scope="module")
def shop(shop_corpus, shop_words):
    """(family, item format) -> task over the small corpus; options are keywords."""

    def make(family: str, item_format: str, **options) -> TaskSpec:
        return specs.make_spec(shop_corpus, family, item_format, shop_words, TaskOptions(**options))

    return make


@pytest.fixture(scope="module")
def beauty(beauty_corpus, t5_words):
    def make(family: str, item_format: str) -> TaskSpec:
        return specs.make_spec(beauty_corpus, family, item_format, t5_words, TaskOptions())

    return make


# Which examples there are.


@pytest.mark.parametrize("name", ["shop", "beauty"])
def test_training_examples_are_all_prefix_pairs(name, request):
    spec = request.getfixturevalue(name)("retrieval", "token")
    expected = all_prefix_pairs(spec.corpus)
    assert samples.num_examples(spec, "train") == len(expected)
    queries = (samples.retrieval_query(spec.corpus, "train", index) for index in range(len(expected)))
    assert all(
        (query.user, query.history.tolist(), query.target) == pair
        for query, pair in zip(queries, expected, strict=True)
    )


def test_held_out_examples_are_the_last_two_items(shop):
    spec = shop("retrieval", "token")
    for split_name, from_end in (("validation", 2), ("test", 1)):
        users = held_out_users(spec.corpus)
        assert samples.num_examples(spec, split_name) == len(users)
        for index, user in enumerate(users):
            query, sequence = samples.retrieval_query(spec.corpus, split_name, index), sequences(spec.corpus)[user]
            position = len(sequence) - from_end
            assert (query.user, query.history.tolist(), query.target) == (user, sequence[:position], sequence[position])


def test_numbers_of_examples_of_beauty(beauty):
    retrieval, mim = beauty("retrieval", "token"), beauty("mim", "token")
    assert [samples.num_examples(retrieval, name) for name in samples.SPLITS] == [131_413, 22_363, 22_363]
    # Every user has five interactions or more, so three for training.
    assert [samples.num_examples(mim, name) for name in samples.SPLITS] == [22_363] * 3


def test_number_of_examples_of_toys(shop):
    with gzip.open(shared("data/amazon_toys") / "interactions.tsv.gz", "rt") as lines:
        next(lines)
        lengths = Counter(line.split("\t")[0] for line in lines)
    offsets = np.concatenate([[0], np.cumsum(list(lengths.values()))])
    corpus = dataclasses.replace(shop("retrieval", "token").corpus, user_offsets=offsets)
    spec = dataclasses.replace(shop("retrieval", "token"), corpus=corpus)
    assert samples.num_examples(spec, "train") == 109_361


def test_mim_users_need_two_training_items(shop):
    spec = numbered(shop("mim", "token"))
    users = mim_users(spec.corpus)
    assert samples.num_examples(spec, "train") == len(users) < spec.corpus.num_users
    for index, user in enumerate(users):
        items = fill(*read(spec, samples.render(spec, "train", index)))
        assert set(items) <= set(training_part(sequences(spec.corpus)[user]))


# What is random.


@settings(max_examples=60)
@given(
    family=st.sampled_from(FAMILIES),
    item_format=st.sampled_from(ITEM_FORMATS),
    split_name=st.sampled_from(samples.SPLITS),
    fraction=st.floats(0, 1, exclude_max=True),
    epochs=st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1)),
    seeds=st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)),
)
def test_rendering_is_pure(shop, family, item_format, split_name, fraction, epochs, seeds):
    spec = shop(family, item_format)
    index = int(fraction * samples.num_examples(spec, split_name))
    one, again, other = (
        samples.render(spec, split_name, index, epoch, seed)
        for epoch, seed in ((epochs[0], seeds[0]), (epochs[0], seeds[0]), (epochs[1], seeds[1]))
    )
    assert one.inputs.dtype == one.targets.dtype == np.int32
    np.testing.assert_array_equal(one.inputs, again.inputs)
    np.testing.assert_array_equal(one.targets, again.targets)
    if family == "retrieval" or split_name != "train":  # nothing random in these
        np.testing.assert_array_equal(one.inputs, other.inputs)
        np.testing.assert_array_equal(one.targets, other.targets)


@pytest.mark.parametrize("changed", [{"epoch": 1}, {"seed": 1}, {"epoch": 2**31 - 1}, {"seed": 2**32 - 1}])
def test_masks_change_with_epoch_and_seed(shop, changed):
    spec = numbered(shop("mim", "token"))
    long = [i for i, user in enumerate(mim_users(spec.corpus)) if spec.corpus.training_lengths[user] >= 10]
    assert len(long) > 10
    same = 0
    for index in long:
        one, other = (samples.render(spec, "train", index, **where) for where in ({}, changed))
        same += np.array_equal(one.inputs, other.inputs)
    assert same <= 2


def test_masks_of_two_users_are_independent(shop):
    spec = numbered(shop("mim", "token", mim_mask_rate=0.5))
    long = [i for i, user in enumerate(mim_users(spec.corpus)) if spec.corpus.training_lengths[user] >= 20]
    masks = {tuple(item is None for item in read(spec, samples.render(spec, "train", index))[0]) for index in long}
    assert len(masks) == len(long) > 5


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_items_are_masked_at_the_given_rate(shop, rate):
    spec = numbered(shop("mim", "token", mim_mask_rate=rate))
    long = [i for i, user in enumerate(mim_users(spec.corpus)) if spec.corpus.training_lengths[user] >= 20]
    masked = np.asarray(
        [
            [item is None for item in read(spec, samples.render(spec, "train", index, epoch))[0]]
            for index in long
            for epoch in range(40)
        ]
    )  # [samples, 20]
    assert masked.any(axis=1).all()
    # An empty mask gets one item, which the expectation below counts.
    expected = rate + (1 - rate) ** 20 / 20
    deviations = (masked.mean() - expected) / np.sqrt(rate * (1 - rate) / masked.size)
    assert abs(deviations) < 4
    assert (abs(masked.mean(axis=0) - expected) < 5 * np.sqrt(rate * (1 - rate) / len(masked))).all()


def test_windows_of_a_long_history_start_everywhere(shop):
    spec = numbered(shop("mim", "token", history_length=5))
    users = mim_users(spec.corpus)
    index = max(range(len(users)), key=lambda i: spec.corpus.training_lengths[users[i]])
    part = training_part(sequences(spec.corpus)[users[index]])
    windows = [fill(*read(spec, samples.render(spec, "train", index, epoch))) for epoch in range(600)]
    starts = Counter(part.index(window[0]) for window in windows)
    assert all(window == part[part.index(window[0]) :][:5] for window in windows)
    assert set(starts) == set(range(len(part) - 4))


# How they are written.


@pytest.mark.parametrize("item_format", ITEM_FORMATS)
@pytest.mark.parametrize("split_name", samples.SPLITS)
def test_a_retrieval_prompt_reads_as_its_template(shop, item_format, split_name):
    spec, between = shop("retrieval", item_format), {"title": " ; ", "token": " "}[item_format]

    def text(item: int) -> str:
        return title_text(spec.corpus, item) if item_format == "title" else f"<item_{item}>"

    for index in range(0, samples.num_examples(spec, split_name), 7):
        query, sample = samples.retrieval_query(spec.corpus, split_name, index), samples.render(spec, split_name, index)
        history = between.join(text(item) for item in query.history[-20:])
        assert spec.vocabulary.decode(sample.inputs) == f"A user chose , in order : {history} . Next item ?"
        assert spec.vocabulary.decode(sample.targets) == text(query.target)


@pytest.mark.parametrize("split_name", samples.SPLITS)
def test_a_mim_prompt_reads_as_its_template(shop, split_name):
    spec, twin = shop("mim", "title"), numbered(shop("mim", "title"))
    for index in range(0, samples.num_examples(spec, split_name), 5):
        window, answer = read(twin, samples.render(twin, split_name, index))
        sample = samples.render(spec, split_name, index)
        shown = ["[masked item]" if item is None else title_text(spec.corpus, item) for item in window]
        expected = f"A user chose , in order : {' ; '.join(shown)} . Masked items ?"
        assert spec.vocabulary.decode(sample.inputs) == expected
        assert spec.vocabulary.decode(sample.targets) == " ; ".join(title_text(spec.corpus, item) for item in answer)


@pytest.mark.parametrize("item_format", ITEM_FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_source_ids_never_occur(shop, family, item_format):
    spec = shop(family, item_format)
    assert spec.corpus.item_source_id(0).startswith("B00QXZ")
    assert spec.corpus.user_source_id(0).startswith("USR")
    for split_name in samples.SPLITS:
        for index in range(samples.num_examples(spec, split_name)):
            text = " ".join(map(spec.vocabulary.decode, samples.render(spec, split_name, index)))
            assert "QXZ" not in text
            assert "USR" not in text


def test_no_asin_in_prompts_of_beauty(beauty):
    spec = beauty("retrieval", "title")
    ids = {spec.corpus.item_source_id(item) for item in range(spec.corpus.num_items)}
    for index in range(0, samples.num_examples(spec, "train"), 331):
        text = " ".join(map(spec.vocabulary.decode, samples.render(spec, "train", index)))
        assert not ids.intersection(re.findall(r"\w+", text))


def titles_of(domain: str) -> list[str]:
    with gzip.open(shared(f"data/{domain}") / "items.jsonl.gz", "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    return [" ".join(record["title"].split()) for record in records if record.get("title")]


@pytest.mark.parametrize("domain", ["amazon_beauty", "amazon_toys"])
def test_pieces_of_real_titles_join(t5_words, domain):
    """Tokens of a title between separators are the title's own tokens. Exceptions: none in these catalogues."""
    titles = titles_of(domain)
    assert len(titles) > 11_000
    [separator] = t5_words.encode([";"])
    framed = t5_words.encode([f"; {title} ;" for title in titles])
    alone = t5_words.encode(titles)
    exceptions = [
        title
        for title, joined, own in zip(titles, framed, alone, strict=True)
        if joined != [*separator, *own, *separator]
    ]
    assert exceptions == []


@settings(max_examples=500)
@given(text=st.text(min_size=1, max_size=12))
def test_pieces_of_any_title_join(t5_words, text):
    title = " ".join(text.split())
    [separator, alone, framed] = t5_words.encode([";", title, f"; {title} ;"])
    if alone:  # else the catalogue writes the item's number
        assert framed == [*separator, *alone, *separator]


def test_joined_pieces_are_the_tokens_of_the_joined_text(beauty):
    spec = beauty("retrieval", "title")
    encode, titles = spec.vocabulary.encode, [title_text(spec.corpus, item) for item in range(spec.corpus.num_items)]
    capped = {item for item, own in enumerate(encode(titles)) if len(own) > spec.options.max_item_tokens - 1}
    compared = 0
    for index in range(0, samples.num_examples(spec, "train"), 217):
        query, sample = samples.retrieval_query(spec.corpus, "train", index), samples.render(spec, "train", index)
        if capped.intersection(query.history[-20:].tolist()):
            continue
        history = " ; ".join(titles[item] for item in query.history[-20:])
        assert [*encode([f"A user chose , in order : {history} . Next item ?"])[0], EOS] == sample.inputs.tolist()
        compared += 1
    assert compared > 300


# Lengths.


@settings(max_examples=250)
@given(
    family=st.sampled_from(FAMILIES),
    item_format=st.sampled_from(ITEM_FORMATS),
    split_name=st.sampled_from(samples.SPLITS),
    fraction=st.floats(0, 1, exclude_max=True),
    spare=st.tuples(st.integers(0, 300), st.integers(0, 100)),
    epoch=st.integers(0, 3),
    history_length=st.integers(1, 45),
    mim_mask_rate=st.sampled_from([0.0, 0.2, 0.9, 1.0]),
)
def test_limits_are_kept(shop, family, item_format, split_name, fraction, spare, epoch, history_length, mim_mask_rate):
    spec = numbered(shop(family, item_format, history_length=history_length, mim_mask_rate=mim_mask_rate))
    index = int(fraction * samples.num_examples(spec, split_name))
    shortest = samples.shortest_row(spec)
    limits = Limits(shortest["inputs"] + spare[0], shortest["targets"] + spare[1])
    whole = samples.render(spec, split_name, index, epoch)
    sample = samples.render(spec, split_name, index, epoch, limits=limits)
    assert len(sample.inputs) <= limits.inputs
    assert len(sample.targets) <= limits.targets

    all_shown, all_answers = read(spec, whole)
    shown, answers = read(spec, sample)  # also checks that the question and whole items stand
    dropped = len(all_shown) - len(shown)
    assert shown
    if family == "retrieval":
        query = samples.retrieval_query(spec.corpus, split_name, index)
        assert all_shown == query.history[-history_length:].tolist()
        assert answers == all_answers == [query.target]
        assert shown == all_shown[dropped:]
        # No item was dropped in vain.
        separator = len(spec.vocabulary.encode([separator_of(spec)])[0])
        if dropped:
            assert len(sample.inputs) + separator + len(spec.catalog.pieces(all_shown[dropped - 1])) > limits.inputs
        return
    window, kept = fill(all_shown, all_answers), fill(shown, answers)
    assert kept == window[dropped:]
    assert answers
    # Nothing was masked that is not masked without limits, but where all of that had to go.
    masked = {place for place, item in enumerate(shown) if item is None}
    assert masked <= {place - dropped for place, item in enumerate(all_shown) if item is None} or masked == {
        len(shown) - 1
    }
    if split_name != "train":
        user = held_out_users(spec.corpus)[index]
        sequence = sequences(spec.corpus)[user]
        assert answers[-1] == sequence[-2 if split_name == "validation" else -1]
        assert shown[-1] is None
        assert window == sequence[: -1 if split_name == "validation" else None][-history_length:]


def test_without_limits_nothing_is_dropped_but_by_the_history_length(shop):
    spec = numbered(shop("retrieval", "title", history_length=3))
    longest = max(range(samples.num_examples(spec, "test")), key=lambda i: len(sequences(spec.corpus)[i]))
    query = samples.retrieval_query(spec.corpus, "test", longest)
    assert read(spec, samples.render(spec, "test", longest))[0] == query.history[-3:].tolist()


def test_all_samples_of_beauty_that_are_long_fit_short_rows(beauty):
    for family in FAMILIES:
        spec = beauty(family, "title")
        limits = Limits(**samples.shortest_row(spec))
        order = np.argsort(-spec.corpus.training_lengths, kind="stable")[:300]
        for user in order.tolist():
            sample = samples.render(spec, "test", user, limits=limits)
            assert len(sample.inputs) <= limits.inputs
            assert len(sample.targets) <= limits.targets


def test_a_history_can_be_empty(shop):
    spec = shop("retrieval", "title")
    prompt = samples.write_history(spec, np.zeros(0, np.int32))
    assert spec.vocabulary.decode(prompt) == "A user chose , in order : . Next item ?"


@pytest.mark.parametrize("options", [{"history_length": 0}, {"max_item_tokens": 1}])
def test_options_that_leave_nothing_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options)).upper()):
        TaskOptions(**options)


# Leaks.


def leaks(spec: TaskSpec, rendered: list[samples.Sample], users: list[int]) -> set[tuple[int, int]]:
    """(user, item) of every held-out item that stands in a numbered sample of its user, wherever that is."""
    tokens = [np.concatenate([*sample]) for sample in rendered]
    assert all((row >= spec.vocabulary.num_tokens).any() for row in tokens)
    owner = np.repeat(users, [len(row) for row in tokens])
    item = np.concatenate(tokens) - spec.vocabulary.num_tokens
    last, before = (
        np.asarray([spec.corpus.sequence(user)[-n] for user in range(spec.corpus.num_users)]) for n in (1, 2)
    )
    found = (item == last[owner]) | (item == before[owner])
    return set(zip(owner[found].tolist(), item[found].tolist(), strict=True))


@pytest.mark.parametrize("item_format", ITEM_FORMATS)
def test_no_training_sample_of_beauty_holds_a_held_out_item(beauty, item_format):
    """No user repeats an item, so the last two items of a user may stand in no training sample of that user."""
    retrieval, mim = numbered(beauty("retrieval", item_format)), numbered(beauty("mim", item_format))
    users = list(range(0, retrieval.corpus.num_users, 1 if item_format == "token" else 7))
    # The longest history comes nearest to what is held out: of n - 2 training items and n - 3 pairs the last.
    last_pairs = (np.cumsum(retrieval.corpus.lengths - 3) - 1)[users].tolist()
    assert [samples.retrieval_query(retrieval.corpus, "train", index).user for index in last_pairs] == users
    assert leaks(retrieval, [samples.render(retrieval, "train", index) for index in last_pairs], users) == set()
    assert leaks(mim, [samples.render(mim, "train", user, epoch=user % 5) for user in users], users) == set()
    # The oracle sees what there is to see.
    few = users[:50]
    targets = retrieval.corpus.targets("validation")[few].tolist()
    assert leaks(mim, [samples.render(mim, "validation", user) for user in few], few) == set(
        zip(few, targets, strict=True)
    )


@pytest.mark.parametrize("item_format", ITEM_FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_training_sample_of_the_shop_is_free_of_held_out_items(shop, family, item_format):
    spec = numbered(shop(family, item_format))
    owners = [user for user, _, _ in all_prefix_pairs(spec.corpus)] if family == "retrieval" else mim_users(spec.corpus)
    held_out = set(held_out_users(spec.corpus))
    for index, user in enumerate(owners):
        if user in held_out:
            sample = samples.render(spec, "train", index)
            items = set(np.concatenate([*sample]) - spec.vocabulary.num_tokens)
            assert not items & set(spec.corpus.sequence(user)[-2:])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_validation_split_does_not_hold_the_test_item(shop, family):
    spec = numbered(shop(family, "token"))
    for index, user in enumerate(held_out_users(spec.corpus)):
        items = set(np.concatenate([*samples.render(spec, "validation", index)]) - spec.vocabulary.num_tokens)
        assert items & set(spec.corpus.sequence(user)[-2:]) == {spec.corpus.sequence(user)[-2]}
