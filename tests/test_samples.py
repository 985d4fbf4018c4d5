"""Samples: pure, complete, within their limits, and free of held-out items, against brute force on item numbers."""

import dataclasses
import functools
import gzip
import json
import re
from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recalign_jax.corpus.catalog import title_text
from recalign_jax.corpus.corpus import Corpus
from recalign_jax.corpus.holdout import SPLITS
from recalign_jax.errors import InputError
from seqio_tasks import examples, prompts, samples, specs, task_names, writing
from seqio_tasks.prompts import CANDIDATES, HISTORY, ITEM
from seqio_tasks.specs import TaskOptions, TaskSpec
from seqio_tasks.writing import Limits
from tests.shared_data import shared

EOS = 1
FAMILIES = task_names.FAMILIES
NEXT = ("retrieval", "ranking", "bpr", "rating")  # an example a training pair
WINDOWS = ("mim", "mlm")  # an example a user
CHOICES = ("ranking", "bpr")
ITEM_FORMATS = ("title", "id", "token")


def training_part(sequence: list[int]) -> list[int]:
    return sequence[:-2] if len(sequence) >= 3 else sequence


@functools.cache
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


def owners(spec: TaskSpec, split: str) -> list[int]:
    """The user of each example."""
    if spec.family == "rating_random":
        users = np.repeat(np.arange(spec.corpus.num_users), spec.corpus.lengths)
        return users[examples.random_part(spec.corpus, split)].tolist()
    if split != "train":
        return held_out_users(spec.corpus)
    return [pair[0] for pair in all_prefix_pairs(spec.corpus)] if spec.family in NEXT else mim_users(spec.corpus)


def numbered(spec: TaskSpec) -> TaskSpec:
    """The task with every token of item i replaced by a number of its own: lengths stay, and items can be read off."""
    catalog, base = spec.catalog, spec.vocabulary.num_tokens
    items = np.arange(catalog.num_items, dtype=np.int32)
    tokens = np.where(catalog.tokens > EOS, base + items[:, None], catalog.tokens)
    shown = base + np.repeat(items, np.diff(spec.displays.offsets))
    return dataclasses.replace(
        spec,
        catalog=dataclasses.replace(catalog, tokens=tokens),
        displays=spec.displays._replace(tokens=shown.astype(np.int32)),
    )


@functools.cache
def tokens_of(vocabulary, text: str) -> list[int]:
    return vocabulary.encode([text])[0]


@functools.cache
def ratings_of(corpus: Corpus, vocabulary) -> list[list[int]]:
    """Tokens of each rating of a corpus, the longest first."""
    known = [] if corpus.ratings is None else np.unique(corpus.ratings).tolist()
    return sorted((tokens_of(vocabulary, f"{value:g}") for value in known), key=len, reverse=True)


class Read(NamedTuple):
    """A sample, read back."""

    wording: int
    history: list[int | None]  # None where an item is masked
    ratings: list[str]  # of the history
    candidates: list[int]
    item: int | None
    neighbours: list[int]
    answer: list[int]


def read(spec: TaskSpec, sample: writing.Sample) -> Read:
    """Reads a numbered sample of any family but MLM whose text is restored first.

    Checks on the way that the prompt is one of the family's wordings, filled with whole items with separators
    between, and ends with end of sequence.
    """
    base, catalog = spec.vocabulary.num_tokens, spec.catalog
    separator, masked, rated, also = (
        tokens_of(spec.vocabulary, text)
        for text in (separator_of(spec), prompts.MASKED_ITEM, prompts.RATED, prompts.NEIGHBOURS)
    )
    values = ratings_of(spec.corpus, spec.vocabulary)
    inputs, targets = sample.inputs.tolist(), sample.targets.tolist()
    assert inputs[-1] == targets[-1] == EOS

    def items(rest: list[int], length_of) -> tuple[list[int | None], list[str], list[int]]:
        """Items from the front, the ratings behind them, and what comes after."""
        found: list[int | None] = []
        ratings: list[str] = []
        while True:
            more = rest
            if found:
                if rest[: len(separator)] != separator:
                    return found, ratings, rest
                more = rest[len(separator) :]
            if more[: len(masked)] == masked:
                found.append(None)
                rest = more[len(masked) :]
            elif more and more[0] >= base:
                found.append(more[0] - base)
                length = length_of(more[0] - base)
                if spec.family == "mlm" and len(found) == 1:  # of a text that alone is too long, the beginning stands
                    length = min(length, next(n for n, token in enumerate([*more, 0]) if token != more[0]))
                assert more[:length] == more[:1] * length
                rest = more[length:]
            else:
                return found, ratings, rest
            if rest[: len(rated)] == rated:
                rest = rest[len(rated) :]
                value = next(value for value in values if rest[: len(value)] == value)
                rest = rest[len(value) :]
                ratings.append(spec.vocabulary.decode(value))

    def shown(item: int) -> int:
        return len(spec.displays.of(item))

    def parse(template) -> Read | None:
        rest, slots, ratings, neighbours = inputs[:-1], {}, [], []
        for part in template:
            if part not in prompts.PLACEHOLDERS:
                literal = tokens_of(spec.vocabulary, part)
                if rest[: len(literal)] != literal:
                    return None
                rest = rest[len(literal) :]
                continue
            slots[part], more, rest = items(rest, shown)
            ratings += more
            if part == HISTORY and rest[: len(also)] == also:
                neighbours, _, rest = items(rest[len(also) :], shown)
        if rest:
            return None
        answer, _, after = items(targets[:-1], lambda item: int(catalog.lengths[item]) - 1)
        assert not after or spec.family.startswith("rating")
        return Read(
            -1, slots[HISTORY], ratings, slots.get(CANDIDATES, []), (slots.get(ITEM) or [None])[0], neighbours, answer
        )

    parsed = [parse(template) for template in prompts.TEMPLATES[spec.wordings]]
    [wording] = [number for number, found in enumerate(parsed) if found]
    return parsed[wording]._replace(wording=wording)


def restored(spec: TaskSpec, sample: writing.Sample) -> writing.Sample:
    """An MLM sample with its spans back in their places, and no target."""
    first = spec.vocabulary.num_tokens - 1
    spans, text = {}, []
    for token in sample.targets[:-1].tolist():
        if first - 100 < token <= first:
            assert token == first - len(spans)
            spans[token] = []
        else:
            spans[first - len(spans) + 1].append(token)
    assert all(spans.values())
    for token in sample.inputs.tolist():
        text += spans.pop(token) if token in spans else [token]
    assert not spans
    return writing.Sample(np.asarray(text, np.int32), np.asarray([EOS], np.int32))


def read_any(spec: TaskSpec, sample: writing.Sample) -> Read:
    return read(spec, restored(spec, sample) if spec.family == "mlm" else sample)


def separator_of(spec: TaskSpec) -> str:
    return prompts.separator(spec.catalog.item_format, bool(spec.fields))


def fill(found: Read) -> list[int]:
    """The window with the answer in the places of the masked items."""
    assert found.history.count(None) == len(found.answer)
    rest = iter(found.answer)
    return [next(rest) if item is None else item for item in found.history]


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
    queries = (examples.next_item(spec.corpus, "train", index) for index in range(len(expected)))
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
            query, sequence = examples.next_item(spec.corpus, split_name, index), sequences(spec.corpus)[user]
            position = len(sequence) - from_end
            assert (query.user, query.history.tolist(), query.target) == (user, sequence[:position], sequence[position])


def test_numbers_of_examples_of_beauty(beauty):
    retrieval, mim = beauty("retrieval", "token"), beauty("mim", "token")
    assert [samples.num_examples(retrieval, name) for name in SPLITS] == [131_413, 22_363, 22_363]
    # Every user has five interactions or more, so three for training.
    assert [samples.num_examples(mim, name) for name in SPLITS] == [22_363] * 3


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
        items = fill(read(spec, samples.render(spec, "train", index)))
        assert set(items) <= set(training_part(sequences(spec.corpus)[user]))


# What is random.


@settings(max_examples=60)
@given(
    family=st.sampled_from(FAMILIES),
    item_format=st.sampled_from(ITEM_FORMATS),
    split_name=st.sampled_from(SPLITS),
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
    if split_name != "train":  # nothing random in these
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
    masks = {tuple(item is None for item in read(spec, samples.render(spec, "train", index)).history) for index in long}
    assert len(masks) == len(long) > 5


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_items_are_masked_at_the_given_rate(shop, rate):
    spec = numbered(shop("mim", "token", mim_mask_rate=rate))
    long = [i for i, user in enumerate(mim_users(spec.corpus)) if spec.corpus.training_lengths[user] >= 20]
    masked = np.asarray(
        [
            [item is None for item in read(spec, samples.render(spec, "train", index, epoch)).history]
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
    windows = [fill(read(spec, samples.render(spec, "train", index, epoch))) for epoch in range(600)]
    starts = Counter(part.index(window[0]) for window in windows)
    assert all(window == part[part.index(window[0]) :][:5] for window in windows)
    assert set(starts) == set(range(len(part) - 4))


# How they are written.


@pytest.mark.parametrize("item_format", ITEM_FORMATS)
@pytest.mark.parametrize("split_name", SPLITS)
def test_a_retrieval_prompt_reads_as_its_template(shop, item_format, split_name):
    spec, between = shop("retrieval", item_format), {"title": " ; ", "id": " ; ", "token": " "}[item_format]

    def text(item: int) -> str:
        shown = {"title": title_text(spec.corpus, item), "id": " ".join(str(item)), "token": f"<item_{item}>"}
        return shown[item_format]

    for index in range(0, samples.num_examples(spec, split_name), 7):
        query, sample = examples.next_item(spec.corpus, split_name, index), samples.render(spec, split_name, index)
        history = between.join(text(item) for item in query.history[-20:])
        written = {f"{before} {history} {after}" for before, _, after in prompts.TEMPLATES["retrieval"][:3]}
        if split_name != "train":
            written = {f"A user chose , in order : {history} . Next item ?"}
        assert spec.vocabulary.decode(sample.inputs) in written
        assert spec.vocabulary.decode(sample.targets) == text(query.target)


@pytest.mark.parametrize("split_name", SPLITS)
def test_a_mim_prompt_reads_as_its_template(shop, split_name):
    spec, twin = shop("mim", "title"), numbered(shop("mim", "title"))
    for index in range(0, samples.num_examples(spec, split_name), 5):
        found = read(twin, samples.render(twin, split_name, index))
        sample = samples.render(spec, split_name, index)
        shown = ["[masked item]" if item is None else title_text(spec.corpus, item) for item in found.history]
        before, _, after = prompts.TEMPLATES["mim"][found.wording]
        assert spec.vocabulary.decode(sample.inputs) == f"{before} {' ; '.join(shown)} {after}"
        answer = " ; ".join(title_text(spec.corpus, item) for item in found.answer)
        assert spec.vocabulary.decode(sample.targets) == answer


@pytest.mark.parametrize("item_format", ITEM_FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_source_ids_never_occur(shop, family, item_format):
    spec = shop(family, item_format)
    assert spec.corpus.item_source_id(0).startswith("B00QXZ")
    assert spec.corpus.user_source_id(0).startswith("USR")
    for split_name in SPLITS:
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
        query, sample = examples.next_item(spec.corpus, "train", index), samples.render(spec, "train", index)
        if capped.intersection(query.history[-20:].tolist()):
            continue
        history = " ; ".join(titles[item] for item in query.history[-20:])
        wordings = [f"{before} {history} {after}" for before, _, after in prompts.TEMPLATES["retrieval"][:3]]
        assert sample.inputs.tolist() in [[*tokens, EOS] for tokens in encode(wordings)]
        compared += 1
    assert compared > 300


# Lengths.


@settings(max_examples=400)
@given(
    family=st.sampled_from(FAMILIES),
    item_format=st.sampled_from(ITEM_FORMATS),
    split_name=st.sampled_from(SPLITS),
    fraction=st.floats(0, 1, exclude_max=True),
    spare=st.tuples(st.integers(0, 300), st.integers(0, 100)),
    epoch=st.integers(0, 3),
    history_length=st.integers(1, 45),
    mim_mask_rate=st.sampled_from([0.0, 0.2, 0.9, 1.0]),
    item_fields=st.sampled_from([(), ("title", "brand"), ("categories",)]),
    neighbours=st.sampled_from([0, 3]),
)
def test_limits_are_kept(shop, family, item_format, split_name, fraction, spare, epoch, **options):
    spec = numbered(shop(family, item_format, test_negatives=20, **options))
    index = int(fraction * samples.num_examples(spec, split_name))
    shortest = samples.shortest_row(spec)
    limits = Limits(shortest["inputs"] + spare[0], shortest["targets"] + spare[1])
    whole = samples.render(spec, split_name, index, epoch)
    sample = samples.render(spec, split_name, index, epoch, limits=limits)
    assert len(sample.inputs) <= limits.inputs
    assert len(sample.targets) <= limits.targets

    complete, found = (
        read_any(spec, whole),
        read_any(spec, sample),
    )  # also checks that the question and whole items stand
    dropped = len(complete.history) - len(found.history)
    assert found.wording == complete.wording
    if family == "rating_random" and not complete.history:
        return
    assert found.history
    assert found.item == complete.item
    assert found.ratings == complete.ratings[dropped:]
    assert set(found.neighbours) <= set(complete.neighbours)
    if family == "mim":
        _check_masks(spec, split_name, index, complete, found)
        return
    assert found.history == complete.history[dropped:]
    assert found.answer == complete.answer
    if family in CHOICES and split_name != "train":
        assert found.candidates == complete.candidates[: len(found.candidates)]  # blind to which one is right
    elif family in CHOICES:
        assert set(found.candidates) <= set(complete.candidates)
        assert len(found.candidates) >= 2
        assert set(found.answer) <= set(found.candidates)
    if dropped:  # no item was dropped in vain
        separator = len(spec.vocabulary.encode([separator_of(spec)])[0])
        newest_dropped = len(spec.displays.of(complete.history[dropped - 1]))
        size = len((restored(spec, sample) if family == "mlm" else sample).inputs)
        assert size + separator + newest_dropped + 10 * family.startswith("rating") > limits.inputs


def _check_masks(spec: TaskSpec, split_name: str, index: int, complete: Read, found: Read) -> None:
    dropped = len(complete.history) - len(found.history)
    window = fill(complete)
    assert fill(found) == window[dropped:]
    assert found.answer
    # Nothing was masked that is not masked without limits, but where all of that had to go.
    masked = {place for place, item in enumerate(found.history) if item is None}
    assert masked <= {place - dropped for place, item in enumerate(complete.history) if item is None} or masked == {
        len(found.history) - 1
    }
    if split_name != "train":
        sequence = sequences(spec.corpus)[held_out_users(spec.corpus)[index]]
        assert found.answer[-1] == sequence[-2 if split_name == "validation" else -1]
        assert found.history[-1] is None
        assert window == sequence[: -1 if split_name == "validation" else None][-spec.options.history_length :]


def test_without_limits_nothing_is_dropped_but_by_the_history_length(shop):
    spec = numbered(shop("retrieval", "title", history_length=3))
    longest = max(range(samples.num_examples(spec, "test")), key=lambda i: len(sequences(spec.corpus)[i]))
    query = examples.next_item(spec.corpus, "test", longest)
    assert read(spec, samples.render(spec, "test", longest)).history == query.history[-3:].tolist()


def test_all_samples_of_beauty_that_are_long_fit_short_rows(beauty):
    for family in ("retrieval", "ranking", "bpr", *WINDOWS):
        spec = beauty(family, "title")
        limits = Limits(**samples.shortest_row(spec))
        order = np.argsort(-spec.corpus.training_lengths, kind="stable")[:300]
        for user in order.tolist():
            sample = samples.render(spec, "test", user, limits=limits)
            assert len(sample.inputs) <= limits.inputs
            assert len(sample.targets) <= limits.targets


def test_a_history_can_be_empty(shop):
    spec = shop("retrieval", "title")
    prompt = samples.write_history(spec, examples.Query(-1, np.zeros(0, np.int32), -1))
    assert spec.vocabulary.decode(prompt) == "A user chose , in order : . Next item ?"


@pytest.mark.parametrize(
    "options",
    [
        *({"history_length": 0}, {"max_item_tokens": 1}, {"ranking_candidates": 1}, {"mim_masked_items": 0}),
        *({"mim_mask_rate": 1.5}, {"mlm_noise_density": -0.1}, {"negatives": "unifrom"}, {"item_fields": ("titel",)}),
        *({"evaluation_wording": "new"}, {"training_wordings": 0}, {"mlm_mean_span_length": 0.5}),
        *({"mixture_temperature": 0}, {"mixture_temperature": float("nan")}, {"mixture_maximum": 0}),
        {"candidate_seed": -1},
    ],
)
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options)).upper()):
        TaskOptions(**options)


# Leaks.


def leaks(spec: TaskSpec, rendered: list[writing.Sample], users: list[int]) -> set[tuple[int, int]]:
    """(user, item) of every held-out item that stands in a numbered sample of its user, but as a negative."""
    held_out = [set(spec.corpus.sequence(user)[-2:].tolist()) for user in range(spec.corpus.num_users)]
    found = set()
    for user, sample in zip(users, rendered, strict=True):
        if spec.corpus.lengths[user] < 3:
            continue
        seen = read_any(spec, sample)
        told = {*seen.history, *seen.answer, seen.item, *seen.neighbours}
        found |= {(user, item) for item in told & held_out[user]}
    return found


@pytest.mark.parametrize("item_format", ITEM_FORMATS)
@pytest.mark.parametrize("family", [*NEXT, *WINDOWS])
def test_every_training_sample_of_the_shop_is_free_of_held_out_items(shop, family, item_format):
    spec = numbered(shop(family, item_format, neighbours=0 if family in WINDOWS else 2))
    users = owners(spec, "train")
    assert len(users) == samples.num_examples(spec, "train")
    rendered = [samples.render(spec, "train", index, epoch=index % 3) for index in range(len(users))]
    found = {(user, item) for user, item in leaks(spec, rendered, users)}
    if not spec.options.neighbours:
        assert found == set()
    else:  # a neighbour can be what is held out: other users have it beside the history
        plain = numbered(shop(family, item_format))
        assert leaks(plain, [samples.render(plain, "train", index) for index in range(len(users))], users) == set()


def test_mixtures_hold_leave_one_out_only():
    assert {family for members in task_names.MIXTURES.values() for family in members} == {*NEXT, *WINDOWS}


@pytest.mark.parametrize("family", [*NEXT, *WINDOWS])
def test_no_training_sample_of_movielens_holds_what_is_held_out(family, movielens_corpus, movielens_words):
    """Every family of every mixture, on real data with ratings."""
    options = TaskOptions(history_length=200)
    spec = numbered(specs.make_spec(movielens_corpus, family, "token", movielens_words, options))
    users = owners(spec, "train")
    # The longest history comes nearest to what is held out, and other places are drawn.
    last = [place for place, user in enumerate(users) if place + 1 == len(users) or users[place + 1] != user]
    chosen = sorted({*last, *range(0, len(users), 197)})
    rendered = [samples.render(spec, "train", index, epoch=index % 7) for index in chosen]
    assert leaks(spec, rendered, [users[index] for index in chosen]) == set()
    # The oracle sees what there is to see.
    held_out = [samples.render(spec, "test", index) for index in range(20)]
    assert len(leaks(spec, held_out, held_out_users(movielens_corpus)[:20])) >= 20


@pytest.mark.parametrize("item_format", ["title", "token"])
def test_no_training_sample_of_beauty_holds_a_held_out_item(beauty, item_format):
    """No user repeats an item, so the last two items of a user may stand in no training sample of that user."""
    every = 11 if item_format == "token" else 53
    for family in ("retrieval", "ranking", "bpr", *WINDOWS):
        spec = numbered(beauty(family, item_format))
        users = list(range(0, spec.corpus.num_users, every))
        # Of n - 2 training items and n - 3 pairs the last.
        chosen = (np.cumsum(spec.corpus.lengths - 3) - 1)[users].tolist() if family in NEXT else users
        rendered = [samples.render(spec, "train", index, epoch=index % 5) for index in chosen]
        assert leaks(spec, rendered, users) == set()


@pytest.mark.parametrize("family", [*NEXT, *WINDOWS])
def test_the_validation_split_does_not_hold_the_test_item(shop, family):
    spec = numbered(shop(family, "token"))
    for index, user in enumerate(held_out_users(spec.corpus)):
        found = read_any(spec, samples.render(spec, "validation", index))
        told = {*found.history, *found.answer, found.item}
        assert told & set(spec.corpus.sequence(user)[-2:]) == {spec.corpus.sequence(user)[-2]}
        assert spec.corpus.sequence(user)[-1] not in found.candidates


# Families.


def test_ranking_and_bpr_show_the_right_item_among_negatives_from_outside_the_training_part(shop):
    for family, size in (("ranking", 7), ("bpr", 2)):
        spec = numbered(shop(family, "token", ranking_candidates=7))
        places, drawn = Counter(), Counter()
        for index, (user, history, target) in enumerate(all_prefix_pairs(spec.corpus)):
            found = read(spec, samples.render(spec, "train", index))
            assert found.history == history[-20:]
            assert found.answer == [target]
            assert len(set(found.candidates)) == len(found.candidates) == size
            negatives = set(found.candidates) - {target}
            assert not negatives & set(training_part(sequences(spec.corpus)[user]))
            places[found.candidates.index(target)] += 1
            drawn.update((user, item) for item in negatives)
        count = sum(places.values())
        assert all(abs(places[place] - count / size) < 4 * (count / size) ** 0.5 for place in range(size))
        # Blind to what is held out: held-out items are drawn, as often as others that the user didn't train on.
        held_out = {(user, item) for user in held_out_users(spec.corpus) for item in sequences(spec.corpus)[user][-2:]}
        expected = 0.0
        for user in held_out_users(spec.corpus):
            outside = 60 - len(training_part(sequences(spec.corpus)[user]))
            expected += 2 * sum(count for (owner, _), count in drawn.items() if owner == user) / outside
        assert abs(sum(drawn[pair] for pair in held_out) - expected) < 4 * expected**0.5


def test_held_out_candidates_are_one_and_99_from_outside_the_whole_history(beauty):
    spec = numbered(beauty("ranking", "token"))
    again = dataclasses.replace(spec, options=TaskOptions(negatives="popularity", history_length=3))
    for split_name in ("validation", "test"):
        for index in range(0, 400, 7):
            found = read(spec, samples.render(spec, split_name, index, seed=index))
            assert len(set(found.candidates)) == 100
            own = set(spec.corpus.sequence(held_out_users(spec.corpus)[index]).tolist())
            assert set(found.candidates) & own == set(found.answer)
            other = read(again, samples.render(again, split_name, index, epoch=3))
            assert other.candidates == found.candidates


def test_ratings_stand_with_the_history_and_are_asked_for(shop):
    spec = numbered(shop("rating", "token"))
    corpus = spec.corpus
    for split_name in SPLITS:
        for index in range(samples.num_examples(spec, split_name)):
            sample = samples.render(spec, split_name, index)
            found, query = read(spec, sample), examples.next_rating(corpus, split_name, index)
            start = corpus.user_offsets[query.user]
            place = start + len(query.history)
            assert found.item == query.target == corpus.items[place]
            assert spec.vocabulary.decode(sample.targets) == f"{corpus.ratings[place]:g}"
            shown = slice(max(start, place - 20), place)
            assert found.history == corpus.items[shown].tolist()
            assert found.ratings == [f"{rating:g}" for rating in corpus.ratings[shown]]
    without = numbered(shop("rating", "token", rating_history=False))
    assert read(without, samples.render(without, "test", 0)).ratings == []


def test_the_random_rating_split_is_8_1_1_and_its_histories_are_of_its_training_part(shop):
    spec = numbered(shop("rating_random", "token", history_length=1000))
    corpus = spec.corpus
    parts = {name: examples.random_part(corpus, name) for name in SPLITS}
    together = np.concatenate([*parts.values()])
    assert sorted(together.tolist()) == list(range(corpus.num_interactions))
    tenth = corpus.num_interactions // 10
    assert [len(parts[name]) for name in ("validation", "test")] == [tenth, tenth]
    trained = set(parts["train"].tolist())
    empty = 0
    for split_name in SPLITS:
        for index, place in enumerate(parts[split_name].tolist()):
            found = read(spec, samples.render(spec, split_name, index))
            user = int(np.searchsorted(corpus.user_offsets, place, side="right")) - 1
            before = [n for n in range(corpus.user_offsets[user], place) if n in trained]
            assert found.item == corpus.items[place]
            assert found.history == corpus.items[before].tolist()
            assert found.ratings == [f"{corpus.ratings[n]:g}" for n in before]
            empty += not before
    assert empty  # a first interaction has no history, and is asked for all the same


@pytest.mark.parametrize("item_format", ITEM_FORMATS)
def test_mlm_restores_the_text_of_a_window(shop, item_format):
    spec = numbered(shop("mlm", item_format))
    users = owners(spec, "train")
    for index, user in enumerate(users):
        part = training_part(sequences(spec.corpus)[user])
        window = read_any(spec, samples.render(spec, "train", index)).history
        assert any(part[start : start + len(window)] == window for start in range(len(part)))
        assert len(window) == min(len(part), 20)


def test_mlm_text_has_its_fields(shop, shop_corpus):
    spec = shop("mlm", "token")
    item = next(item for item in range(60) if shop_corpus.item_text(item).brand)
    assert spec.vocabulary.decode(spec.displays.of(item)) == f"<item_{item}> , brand : Acme , category : Tubs"
    fields = shop("retrieval", "title", item_fields=["title", "categories"])
    assert spec.vocabulary.decode(fields.displays.of(item)) == "Acme Tubs , categories : Bath , Tubs"


def test_mlm_masks_the_given_share(shop):
    spec = shop("mlm", "title", mlm_noise_density=0.3, mlm_mean_span_length=2.0)
    masked = total = spans = 0
    for index in range(samples.num_examples(spec, "train")):
        sample = samples.render(spec, "train", index)
        sentinels = int((sample.targets >= spec.vocabulary.num_tokens - 100).sum())
        spans += sentinels
        masked += len(sample.targets) - 1 - sentinels
        question = writing_size(spec, sample)
        total += len(sample.inputs) - question - sentinels + len(sample.targets) - 1 - sentinels
    assert abs(masked / total - 0.3) < 0.01
    assert 1.7 < masked / spans < 2.4


def writing_size(spec: TaskSpec, sample: writing.Sample) -> int:
    """Tokens of the question of an MLM sample, whichever wording it has."""
    text = spec.vocabulary.decode(sample.inputs)
    for before, _, after in prompts.TEMPLATES["mlm"]:
        if text.startswith(before) and text.endswith(after):
            return sum(len(spec.vocabulary.encode([part])[0]) for part in (before, after)) + 1
    raise AssertionError(text)


def test_so_many_items_are_masked(shop):
    spec = numbered(shop("mim", "token", mim_masked_items=3))
    for split_name in SPLITS:
        for index, user in enumerate(owners(spec, split_name)):
            found = read(spec, samples.render(spec, split_name, index))
            assert len(found.answer) == min(3, max(len(found.history) - 1, 1)), user


def test_without_prefix_augmentation_a_user_has_one_example(shop):
    for family in NEXT:
        spec = numbered(shop(family, "token", prefix_augmentation=False))
        users = mim_users(spec.corpus)
        assert samples.num_examples(spec, "train") == len(users)
        for index, user in enumerate(users):
            found = read(spec, samples.render(spec, "train", index))
            part = training_part(sequences(spec.corpus)[user])
            assert found.history == part[:-1][-20:]
            assert (found.item if family == "rating" else found.answer[0]) == part[-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_held_out_wording_is_no_training_wording(shop, family):
    spec = numbered(shop(family, "token", evaluation_wording="held_out"))
    last = len(prompts.TEMPLATES[spec.wordings]) - 1
    trained = Counter(
        read_any(spec, samples.render(spec, "train", index)).wording
        for index in range(samples.num_examples(spec, "train"))
    )
    assert set(trained) == set(range(last))
    assert {read_any(spec, samples.render(spec, "test", index)).wording for index in range(20)} == {last}
    seen = numbered(shop(family, "token", training_wordings=1))
    assert {read_any(seen, samples.render(seen, name, index)).wording for name in SPLITS for index in range(20)} == {0}


def test_neighbours_stand_behind_the_history(shop):
    spec, plain = numbered(shop("retrieval", "token", neighbours=4)), numbered(shop("retrieval", "token"))
    with_some = 0
    for index in range(samples.num_examples(spec, "train")):
        found = read(spec, samples.render(spec, "train", index))
        assert found._replace(neighbours=[]) == read(plain, samples.render(plain, "train", index))
        assert len(found.neighbours) <= 4
        assert not set(found.neighbours) & set(found.history)
        with_some += bool(found.neighbours)
    assert with_some > 100
