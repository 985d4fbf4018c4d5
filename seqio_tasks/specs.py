"""What a task is made of: its corpus, catalogue, vocabulary and options. Needs neither SeqIO nor TensorFlow."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterable, Sequence

import gin

from recalign_jax import terminal
from recalign_jax.corpus.candidates import CANDIDATE_SEED, NEGATIVES, NUM_TEST_NEGATIVES
from recalign_jax.corpus.catalog import FIELDS, MAX_ITEM_TOKENS, Catalog, Pieces, build_catalog, item_pieces
from recalign_jax.corpus.corpus import Corpus, load_corpus
from recalign_jax.errors import InputError, check_kinds, did_you_mean
from seqio_tasks import ambiguity, prompts, task_names, vocabulary
from seqio_tasks.task_names import MIXTURES, RATED_FAMILIES, TaskName, split_name
from seqio_tasks.vocabulary import Vocabulary

MAX_RATING_VALUES = 100
EVALUATION_WORDINGS = ("seen", "held_out")


@gin.configurable
@dataclasses.dataclass(frozen=True)
class TaskOptions:
    """Choices that the paper leaves open, one set for all tasks of a run.

    Attributes:
      history_length: most items of a user's past in a prompt; the newest stay.
      prefix_augmentation: whether every prefix of a user's training items is an example of retrieval, ranking, rating
        and BPR, or only the longest.
      max_item_tokens: longest token sequence of an item, end of sequence counted.
      item_fields: text that follows an item in a history or among candidates, of `catalog.FIELDS`.
      neighbours: number of collaborative neighbours of the history in prompts of retrieval, ranking and BPR.
      mim_mask_rate: probability that an item of the window is masked; at least one always is.
      mim_masked_items: if given, so many items are masked instead; of two or more, one at least is not.
      mlm_fields: what follows an item (its title, digits or token) in the text that MLM masks spans of, of
        `catalog.FIELDS`.
      mlm_noise_density: share of the tokens that MLM masks.
      mlm_mean_span_length: of MLM's masked spans, in tokens.
      negatives: what training negatives are drawn from, one of `candidates.NEGATIVES`.
      ranking_candidates: candidates of a ranking example in training, the right one among them.
      test_negatives: candidates beside the right one of held-out ranking examples.
      candidate_seed: of the held-out candidates, which don't depend on the seed of a run.
      rating_history: whether the items of a rating prompt stand with their ratings.
      training_wordings: how many of a family's wordings training draws from; the last one is never among them.
      evaluation_wording: the wording of held-out examples and inference, `seen` (the first) or `held_out` (the last).
      mixture_maximum: number of examples above which a task's mixing rate no longer grows; None for no cap.
      mixture_temperature: T of rate = examples ** (1 / T); a large one mixes equally.
    """

    history_length: int = 20
    prefix_augmentation: bool = True
    max_item_tokens: int = MAX_ITEM_TOKENS
    item_fields: Sequence[str] = ()
    neighbours: int = 0
    mim_mask_rate: float = 0.2
    mim_masked_items: int | None = None
    mlm_fields: Sequence[str] = ("title", "brand", "category")
    mlm_noise_density: float = 0.15
    mlm_mean_span_length: float = 3.0
    negatives: str = "uniform"
    ranking_candidates: int = 10
    test_negatives: int = NUM_TEST_NEGATIVES
    candidate_seed: int = CANDIDATE_SEED
    rating_history: bool = True
    training_wordings: int = 3
    evaluation_wording: str = "seen"
    mixture_maximum: int | None = None
    mixture_temperature: float = 1.0

    def __post_init__(self) -> None:
        check_kinds(self)
        object.__setattr__(self, "item_fields", tuple(self.item_fields))  # gin gives lists, which can't be hashed
        object.__setattr__(self, "mlm_fields", tuple(self.mlm_fields))
        least = {
            "history_length": (1, "a prompt needs at least one item"),
            "max_item_tokens": (2, "a token and the end of sequence take 2"),
            "neighbours": (0, "0 is none"),
            "ranking_candidates": (2, "there must be something to tell the right one from"),
            "test_negatives": (1, "there must be something to tell the right one from"),
            "training_wordings": (1, "a prompt needs words"),
            "mlm_mean_span_length": (1, "a span holds a token"),
            "candidate_seed": (0, "a seed is not negative"),
        }
        for name, (minimum, why) in least.items():
            if getattr(self, name) < minimum:
                raise InputError(f"{name.upper()} is {getattr(self, name)}; {why}.")
        if self.mim_masked_items is not None and self.mim_masked_items < 1:
            raise InputError(f"MIM_MASKED_ITEMS is {self.mim_masked_items}; at least one item is masked.")
        if self.mixture_maximum is not None and self.mixture_maximum < 1:
            raise InputError(f"MIXTURE_MAXIMUM is {self.mixture_maximum}; no task would be drawn. None is no cap.")
        if not self.mixture_temperature > 0:
            raise InputError(f"MIXTURE_TEMPERATURE is {self.mixture_temperature}; it must be above 0, and 1 is usual.")
        for name in ("mim_mask_rate", "mlm_noise_density"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name.upper()} is {getattr(self, name)}, not a share from 0 to 1.")
        choices: list[tuple[str, Sequence[str], Iterable[str]]] = [
            ("item_fields", self.item_fields, FIELDS),
            ("mlm_fields", self.mlm_fields, FIELDS),
            ("negatives", [self.negatives], NEGATIVES),
            ("evaluation_wording", [self.evaluation_wording], EVALUATION_WORDINGS),
        ]
        for name, values, known in choices:
            for value in values:
                if value not in known:
                    hint = did_you_mean(value, known)
                    raise InputError(f"{name.upper()}: there is no {value!r}, only {', '.join(known)}.{hint}")


@dataclasses.dataclass(frozen=True)
class TaskSpec:
    """All that `samples.render` needs: a family over a corpus, in an item format, with a vocabulary.

    Attributes:
      family: one of `task_names.FAMILIES`.
      corpus: the corpus.
      catalog: the items as targets.
      displays: the items as they stand in prompts.
      vocabulary: of the text.
      options: of the run.
    """

    family: str
    corpus: Corpus
    catalog: Catalog
    displays: Pieces
    vocabulary: Vocabulary
    options: TaskOptions

    @property
    def name(self) -> str:
        return str(TaskName((self.corpus.name,), self.family, self.catalog.item_format))

    @property
    def num_tokens(self) -> int:
        """Number of entries of the vocabulary, item tokens included."""
        return self.vocabulary.num_tokens + (self.corpus.num_items if self.catalog.item_format == "token" else 0)

    @property
    def fields(self) -> Sequence[str]:
        """The fields of text in `displays`."""
        return self.options.mlm_fields if self.family == "mlm" else self.options.item_fields

    @property
    def wordings(self) -> str:
        """The family whose wordings this one has."""
        return "rating" if self.family == "rating_random" else self.family


@functools.lru_cache(maxsize=8)
def _catalog(corpus: Corpus, item_format: str, words: Vocabulary, longest: int, fields: tuple[str, ...]) -> Catalog:
    return build_catalog(corpus, item_format, words.encode, words.num_tokens, longest, fields)


@functools.lru_cache(maxsize=8)
def _pieces(corpus: Corpus, item_format: str, words: Vocabulary, longest: int, fields: tuple[str, ...]) -> Pieces:
    return item_pieces(corpus, item_format, words.encode, words.num_tokens, fields, longest)


def make_spec(corpus: Corpus, family: str, item_format: str, words: Vocabulary, options: TaskOptions) -> TaskSpec:
    """Builds a task over a loaded corpus; catalogues are shared between tasks.

    Raises:
      InputError: when the vocabulary can't write the prompts, or the corpus has too many different ratings.
    """
    vocabulary.check_pieces(words, prompts.literals())
    if family in RATED_FAMILIES:
        _check_ratings(corpus)
    catalog = _catalog(corpus, item_format, words, options.max_item_tokens, options.item_fields)
    displays = catalog.displays
    if family == "mlm" and options.mlm_fields != options.item_fields:
        displays = _pieces(corpus, item_format, words, options.max_item_tokens, options.mlm_fields)
    return TaskSpec(family, corpus, catalog, displays, words, options)


def can_be_rated(corpus: Corpus) -> bool:
    """Whether a corpus has ratings, and so few different ones that a model can write each."""
    return corpus.ratings is not None and corpus.num_rating_values <= MAX_RATING_VALUES


def families_in(base: str, corpus: Corpus) -> tuple[str, ...]:
    """The families of a task or mixture of a corpus; of `all` those that it can give."""
    rated = base != "all" or can_be_rated(corpus)
    return tuple(family for family in task_names.members(base) if rated or family not in RATED_FAMILIES)


def warn_of_ratings(corpus: Corpus) -> None:
    """Warns where there are ratings, but too many different ones."""
    if corpus.ratings is not None and not can_be_rated(corpus):
        terminal.warn(f"{corpus.name} has {corpus.num_rating_values} different ratings: too many for rating tasks.")


def _check_ratings(corpus: Corpus) -> None:
    different = corpus.num_rating_values
    if different > MAX_RATING_VALUES:
        raise InputError(
            f"Corpus {corpus.name} has {different} different ratings; written as text there can be at most "
            f"{MAX_RATING_VALUES}. Round them, as to half stars, and prepare it again."
        )


def task_spec(name: str, vocabulary_path: str, data_dir: str | pathlib.Path | None) -> TaskSpec:
    """The task of that name, with the options that gin holds.

    Raises:
      InputError: for an unknown name (a mixture's too), or a vocabulary that doesn't fit.
    """
    parts = split_name(name, data_dir)
    if len(parts.corpora) > 1 or parts.base in MIXTURES:
        fitting = parts.of(parts.corpora[0], task_names.members(parts.base)[0])
        raise InputError(f"{name!r} is a mixture; a single task is needed here, as {fitting!r}.")
    [corpus] = parts.corpora
    words = vocabulary.load(vocabulary_path)
    spec = make_spec(load_corpus(corpus, data_dir), parts.base, parts.item_format, words, TaskOptions())
    ambiguity.warn_of_ambiguous_items(spec.corpus, spec.catalog, words)
    return spec
