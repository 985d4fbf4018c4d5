"""The items and users of a corpus as TFDS datasets in array_record files: record i is item (user) i.

TFDS writes them; `tfds.builder_from_directory(DIR).as_data_source("full")` reads them. Here they are read through
the array_record reader, which takes no TensorFlow and a tenth of the time of TFDS's own data source.
"""

import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from recalign_jax import errors, terminal
from recalign_jax.corpus.build import Sequences
from recalign_jax.corpus.records import ItemText

SPLIT = "full"
_RECORDS_A_FILE = 1_000_000
_RECORDS_A_READ = 4096


def write_items(directory: pathlib.Path, name: str, ids: Sequence[str], texts: Sequence[ItemText]) -> None:
    """Writes the dataset NAME_items into a new directory."""
    import tensorflow_datasets as tfds

    features = {
        "item": np.int64,
        "item_id": tfds.features.Text(),
        "title": tfds.features.Text(),
        "categories": tfds.features.Sequence(tfds.features.Text()),
        "brand": tfds.features.Text(),
        "price": np.float32,  # NaN where it isn't known
        "extra_names": tfds.features.Sequence(tfds.features.Text()),
        "extra_texts": tfds.features.Sequence(tfds.features.Text()),
    }
    examples = (
        {
            "item": item,
            "item_id": item_id,
            "title": text.title,
            "categories": list(text.categories),
            "brand": text.brand,
            "price": np.float32("nan" if text.price is None else text.price),
            "extra_names": list(text.extra),
            "extra_texts": list(text.extra.values()),
        }
        for item, (item_id, text) in enumerate(zip(ids, texts, strict=True))
    )
    _write_dataset(directory, f"{name}_items", features, examples, len(ids))


def write_users(directory: pathlib.Path, name: str, sequences: Sequences) -> None:
    """Writes the dataset NAME_users into a new directory."""
    import tensorflow_datasets as tfds

    values = {"items": sequences.items, "timestamps": sequences.timestamps, "ratings": sequences.ratings}
    columns = {column: array for column, array in values.items() if array is not None}
    features = {
        "user": np.int64,
        "user_id": tfds.features.Text(),
        **{column: tfds.features.Tensor(shape=(None,), dtype=array.dtype) for column, array in columns.items()},
    }
    examples = (
        {
            "user": user,
            "user_id": user_id,
            **{
                column: array[sequences.offsets[user] : sequences.offsets[user + 1]]
                for column, array in columns.items()
            },
        }
        for user, user_id in enumerate(sequences.user_ids)
    )
    _write_dataset(directory, f"{name}_users", features, examples, len(sequences.user_ids))


def read_items(directory: pathlib.Path) -> tuple[list[str], list[ItemText]]:
    """Returns the source ids and the text of all items, [I] each, in the order of the item index."""
    ids, texts = [], []
    for feature in _records(directory / "items"):
        (price,) = feature["price"].float_list.value
        ids.append(_one(feature, "item_id"))
        texts.append(
            ItemText(
                title=_one(feature, "title"),
                categories=tuple(_many(feature, "categories")),
                brand=_one(feature, "brand"),
                price=None if np.isnan(price) else price_of_record(price),
                extra=dict(zip(_many(feature, "extra_names"), _many(feature, "extra_texts"), strict=True)),
            )
        )
    return ids, texts


def read_user_ids(directory: pathlib.Path) -> list[str]:
    """Returns the source ids of all users, [U], in the order of the user index."""
    return [_one(feature, "user_id") for feature in _records(directory / "users")]


def price_of_record(price: float) -> float:
    """Returns the shortest number that is the same in the 32 bits that a record has."""
    return float(str(np.float32(price)))


def _write_dataset(
    directory: pathlib.Path, name: str, features: Mapping[str, Any], examples: Iterable[Mapping[str, Any]], total: int
) -> None:
    import tensorflow_datasets as tfds

    directory.mkdir()
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=name, version=tfds.core.Version("1.0.0"), data_dir=str(directory), module_name="recalign_jax.corpus"
    )
    info = tfds.core.DatasetInfo(
        builder=identity, features=tfds.features.FeaturesDict(features), description=f"{name}: record i is number i."
    )
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=_RECORDS_A_FILE, file_format="array_record")
    writer.initialize_splits([SPLIT])
    with terminal.progress(f"Writing {directory.name}", total, "records") as advance:

        def counted() -> Iterator[Mapping[str, Any]]:
            for example in examples:
                yield example
                advance()

        writer.add_examples({SPLIT: counted()})
    writer.close_all()


def _records(directory: pathlib.Path) -> Iterator[Mapping[str, Any]]:
    """Yields the features of each record of a dataset, in order. Raises InputError if there are no files."""
    from array_record.python import array_record_module
    from tensorflow_datasets.proto import tf_example_pb2

    paths = sorted(directory.glob("*.array_record-*"))
    if not paths:
        raise errors.InputError(f"{directory} holds no records. Prepare the corpus again.")
    for path in paths:
        reader = array_record_module.ArrayRecordReader(str(path))
        count = reader.num_records()
        for start in range(0, count, _RECORDS_A_READ):
            for record in reader.read(start, min(start + _RECORDS_A_READ, count)):
                yield tf_example_pb2.Example.FromString(record).features.feature
        reader.close()


def _one(feature: Mapping[str, Any], name: str) -> str:
    (value,) = feature[name].bytes_list.value
    return value.decode()


def _many(feature: Mapping[str, Any], name: str) -> list[str]:
    return [value.decode() for value in feature[name].bytes_list.value]
