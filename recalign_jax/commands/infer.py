"""`recalign infer`: batch inference, the best items of every user of a corpus or of a table of histories."""

import argparse
import dataclasses
import hashlib
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import gin

from recalign_jax import __version__, files, gin_config, partitioning, recommender, terminal
from recalign_jax.checkpoint.fingerprints import fingerprints
from recalign_jax.commands.common import Model, load_model
from recalign_jax.corpus import more_items
from recalign_jax.corpus.corpus import Corpus
from recalign_jax.errors import InputError, check_choice, check_kinds
from recalign_jax.inference import answers, chunks, filters, output, requests
from recalign_jax.inference import job as inference_job
from recalign_jax.inference.answers import Models, Row
from recalign_jax.inference.job import AnswerRequests
from recalign_jax.inference.requests import Requests
from recalign_jax.inference.rows import Needs, Request
from recalign_jax.recommender import DecodingOptions
from seqio_tasks import specs, task_names
from seqio_tasks import vocabulary as vocabularies

USES_GIN = True
FAMILIES = ("retrieval", "ranking")


@gin.configurable("infer", module="recalign")
@dataclasses.dataclass(frozen=True)
class InferOptions:
    """What a job of batch inference is.

    Attributes:
      task_name: a retrieval task for the best items of the catalogue; a ranking task to order the candidates of the
        rows of `input`.
      checkpoint_path: MODEL_DIR, or one checkpoint in it.
      vocabulary: a SentencePiece model, see `vocabularies.find`.
      output_dir: OUTPUT_DIR.
      output_format: `jsonl` or `parquet`.
      input: path of a table of histories, see `inference/rows.py`; None for the users of the corpus.
      split: without `input`: `test` or `validation` for the history before that target, `all` for the whole.
      max_users: without `input`: only so many users, a random sample.
      on_unknown_item: what to do with items of a row that the catalogue doesn't have: `drop` them, or `reject` the row.
      filter_history: leave out what the user already has.
      allow: path of a text file with an item id a line: only these are recommended.
      deny: path of such a file: none of these is.
      category: name of a category, or several: only their items are recommended.
      items: path of a table of items (item_id, title, ...): those that the corpus lacks are recommended, too.
      ratings: predict the ratings of what is recommended, too.
      chunk_rows: rows that are done again after a kill, at most.
      shard: of `num_shards` jobs that share one OUTPUT_DIR, the number of this one.
      num_shards: each does its part of the chunks, and who is last puts them together.
      mesh: devices along each axis; None puts all along `data`.
    """

    task_name: str | None = None
    checkpoint_path: str | None = None
    vocabulary: str | None = None
    output_dir: str | None = None
    output_format: str = "jsonl"
    input: str | None = None
    split: str = "test"
    max_users: int | None = None
    on_unknown_item: str = "drop"
    filter_history: bool = True
    allow: str | None = None
    deny: str | None = None
    category: str | Sequence[str] | None = None
    items: str | None = None
    ratings: bool = False
    chunk_rows: int = 2048
    shard: int = 0
    num_shards: int = 1
    mesh: dict[str, int] | None = None

    def __post_init__(self) -> None:
        check_kinds(self)
        check_choice("OUTPUT_FORMAT", self.output_format, output.FILES)
        check_choice("ON_UNKNOWN_ITEM", self.on_unknown_item, requests.ON_UNKNOWN_ITEM)
        for name in ("chunk_rows", "max_users"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name.upper()} is {value}; give at least 1.")
        if not 0 <= self.shard < self.num_shards:
            raise InputError(f"SHARD {self.shard} of NUM_SHARDS {self.num_shards}: shards count from 0.")


class Answering(NamedTuple):
    """A loaded model with its filters.

    Attributes:
      corpus: the corpus, with new items.
      needs: of a row.
      answer: (requests, told how many more are answered) -> a row of output for each, see `answers.answer`.
      identity: all that the answers depend on, as JSON.
    """

    corpus: Corpus
    needs: Needs
    answer: AnswerRequests
    identity: dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All that a job is stands in gin."""
    del parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Writes the recommendations as gin says."""
    options = InferOptions()
    output_dir = files.local_folder("OUTPUT_DIR", gin_config.required("OUTPUT_DIR", options.output_dir, "DIR"))
    start = time.monotonic()
    answering = load(args.data_dir, options)
    asked = _requests(answering, options)
    job = answering.identity | {
        "input": asked.fingerprint,
        "rows": asked.total,
        "chunk_rows": options.chunk_rows,
        "output_format": options.output_format,
    }
    shards = (options.shard, options.num_shards)
    counts = inference_job.run(output_dir, job, asked, answering.answer, options.chunk_rows, *shards)
    results = output.path_of(output_dir, options.output_format)
    if counts is not None:
        _tell(results, output_dir, counts)
    seconds = round(time.monotonic() - start, 3)
    return (counts or {"users": 0}) | {"output": str(results) if counts else None, "seconds": seconds}


def load(data_dir: str | None, options: InferOptions) -> Answering:
    """Loads what answers requests.

    Args:
      data_dir: where corpora are.
      options: of the job; what rows there are and where answers go doesn't matter here.

    Raises:
      InputError: when something is missing, or doesn't fit the checkpoint.
    """
    task_name = gin_config.required("TASK_NAME", options.task_name, "movielens_retrieval_token")
    checkpoint_path = gin_config.required("CHECKPOINT_PATH", options.checkpoint_path, "DIR")
    vocabulary = vocabularies.find(gin_config.required("VOCABULARY", options.vocabulary, "PATH"), data_dir)
    spec = specs.task_spec(task_name, vocabulary, data_dir)
    if spec.family not in FAMILIES:
        fitting = task_names.with_format("retrieval", spec.catalog.item_format)
        raise InputError(
            f"TASK_NAME {spec.name} is a {spec.family} task; give one that recommends, as {spec.corpus.name}_{fitting}."
        )
    model = load_model(spec, checkpoint_path, options.mesh, "BATCH_SIZE")
    if spec.family == "ranking":
        _warn_untrained(model, "ranking", data_dir)
    if options.ratings:
        _warn_untrained(model, "rating", data_dir)
    if options.items is not None:
        spec = _with_items(spec, options.items)
    corpus = spec.corpus
    several = options.category if isinstance(options.category, (list, tuple)) else [options.category]
    categories = [str(category) for category in several if category is not None]  # one may be called 2000
    permitted = filters.permitted_items(corpus, options.allow, options.deny, categories)
    decoding = DecodingOptions()
    place = (model.graphdef, decoding, partitioning.batch_sharding(model.mesh))
    recommend = score = rate = None
    if spec.family == "ranking":
        if permitted is not None:
            raise InputError("ALLOW, DENY and CATEGORY choose from the catalogue; a ranking task has its candidates.")
        score = recommender.make_scorer(spec, *place, model.model_dir)(model.params)
    else:
        recommend = recommender.make_recommender(spec, *place, model.model_dir, permitted)(model.params)
    if options.ratings:
        if corpus.ratings is None:
            raise InputError(f"RATINGS: corpus {corpus.name} has no ratings.")
        rated = specs.make_spec(corpus, "rating", spec.catalog.item_format, spec.vocabulary, spec.options)
        rate = recommender.make_rater(rated, *place)(model.params)
    identity = {
        "version": __version__,
        "task": spec.name,
        "corpus": corpus.fingerprint,
        "catalog": spec.catalog.fingerprint,
        "vocabulary": spec.vocabulary.fingerprint,
        "step": model.step,
        "parameters": _hash(json.dumps(fingerprints(model.params), sort_keys=True).encode()),
        "model": _what_counts(dataclasses.asdict(model.config) | {"activation_dtype": str(model.config.dtype)}),
        "permitted": permitted if permitted is None else _hash(permitted.tobytes()),
        "tasks": dataclasses.asdict(spec.options),
        "decoding": _what_counts(dataclasses.asdict(decoding)),
        "on_unknown_item": options.on_unknown_item,
        "filter_history": options.filter_history,
        "ratings": options.ratings,
    }
    needs = Needs(
        candidates=score is not None,
        ratings=rate is not None and spec.options.rating_history,
        known_items=options.on_unknown_item == "reject",
    )
    models = Models(recommend, score, rate)

    def answer(asked: Sequence[Request], advance: Callable[[int], None] = lambda count: None) -> list[Row]:
        return answers.answer(corpus, models, asked, permitted, decoding.top_k, options.filter_history, advance)

    return Answering(corpus, needs, answer, json.loads(json.dumps(identity)))


def _with_items(spec: specs.TaskSpec, path: str) -> specs.TaskSpec:
    """The task over a corpus that has the items of a table, too."""
    if spec.catalog.item_format != "title":
        raise InputError(f"ITEMS: items as {spec.catalog.item_format} are known from training alone; new ones need "
                         f"a model that was trained with items as title.")  # fmt: skip
    corpus = more_items.with_table(spec.corpus, pathlib.Path(path))
    return specs.make_spec(corpus, spec.family, "title", spec.vocabulary, spec.options)


def _what_counts(settings: dict[str, Any]) -> dict[str, Any]:
    """Without those that answers don't depend on; a smaller batch is how a job goes on that ran out of memory."""
    return {name: value for name, value in settings.items() if name not in ("dropout_rate", "remat", "batch_size")}


def _warn_untrained(model: Model, family: str, data_dir: str | None) -> None:
    mixture = model.identity.get("MIXTURE_OR_TASK_NAME", "").strip("'")
    try:
        trained = task_names.members(task_names.split_name(mixture, data_dir).base)
    except InputError:  # of a module of the user's own, or of a corpus that isn't here
        return
    if not any(member.startswith(family) for member in trained):  # rating_random teaches rating
        terminal.warn(f"{model.model_dir} was trained on {mixture}: nothing there taught it {family}.")


def _requests(answering: Answering, options: InferOptions) -> Requests:
    if options.input is not None:
        if options.max_users is not None:
            raise InputError("MAX_USERS is of the users of a corpus: of a table give fewer rows.")
        return requests.of_table(pathlib.Path(options.input), answering.corpus, answering.needs)
    if answering.needs.candidates:
        raise InputError("A ranking task orders the candidates of the rows of a table: give --gin.INPUT=PATH.")
    return requests.of_corpus(answering.corpus, options.split, options.max_users)


def _tell(results: pathlib.Path, output_dir: pathlib.Path, counts: dict[str, int]) -> None:
    terminal.say(f"Recommendations for {counts['users']} users: {results}")
    if counts["unknown_items"]:
        terminal.warn(f"{counts['unknown_items']} items are not in the catalogue: see unknown_items there.")
    if counts["without_history"]:
        terminal.say(
            f"{counts['without_history']} users have no history, or none that the catalogue knows: their items "
            "stand by popularity."
        )
    if counts["rejected"]:
        terminal.warn(f"{counts['rejected']} rows could not be used: {output_dir / chunks.REJECTED_FILE}")
    if results.suffix == ".jsonl":
        terminal.next_step("head", "-n", "3", str(results))
    else:
        shown = f"from pyarrow import parquet; print(parquet.read_table('{results}').slice(0, 3).to_pylist())"
        terminal.next_step("python", "-c", shown)


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
