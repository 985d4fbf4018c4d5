"""From (mixture, seed) to packed batches, by arithmetic: no sample depends on the one before it.

The stream of samples is cut into windows. Which samples of which task stand in window w is computed from w
alone; a window is rendered and packed by itself. Windows belong to fixed logical shards (window w to shard
w mod S), every batch takes the same number of rows from each shard, and a process reads some of the shards:
those of the rows that its devices hold, which several processes may hold together.
So the position of a run is (window, row) of each shard: resuming replays nothing, and the batches do not
depend on the number of processes.
"""

import collections
import dataclasses
import functools
import threading
import zlib
from collections.abc import Iterator, Sequence

import gin
import grain
import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from recalign_jax import host, partitioning
from recalign_jax.errors import InputError, check_choice, check_kinds
from recalign_jax.training import packing
from seqio_tasks.components import Component
from seqio_tasks.writing import Limits

Batch = dict[str, np.ndarray]
BATCHES_AHEAD = 2
# Threads share an interpreter: several windows at once are done no sooner than one after the other, and leave a small
# part of its time to the main thread, which traces and dispatches.
_ONE_AT_A_TIME = threading.Lock()


@gin.configurable
@dataclasses.dataclass(frozen=True)
class InputOptions:
    """How samples become batches.

    Attributes:
      task_feature_lengths: tokens of a row, `{"inputs": L, "targets": T}`.
      batch_size: packed rows of a step, over all processes.
      loss_normalization: `samples` or `tokens`; see `packing.pack`.
      window: samples that are rendered and packed together.
      data_shards: S, the logical shards; must divide batch_size, and the number of processes (those that hold the
        same rows count once) must divide it.
        None takes the greatest common divisor of batch_size and 8.
      workers: processes that render windows for each shard; 0 renders in a thread.
    """

    task_feature_lengths: dict[str, int] = dataclasses.field(default_factory=lambda: {"inputs": 512, "targets": 128})
    batch_size: int = 32
    loss_normalization: str = "samples"
    window: int = 2048
    data_shards: int | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        check_kinds(self)
        lengths = self.task_feature_lengths
        if set(lengths) != {"inputs", "targets"}:
            raise InputError(f"TASK_FEATURE_LENGTHS must name inputs and targets, not {sorted(map(str, lengths))}.")
        for name, length in lengths.items():
            if not isinstance(length, int) or length < 1:
                raise InputError(f"TASK_FEATURE_LENGTHS {name} is {length!r}: must be a whole number, at least 1.")
        check_choice("LOSS_NORMALIZATION", self.loss_normalization, packing.LOSS_NORMALIZATIONS)

    def num_shards(self) -> int:
        return int(np.gcd(self.batch_size, 8)) if self.data_shards is None else self.data_shards


@dataclasses.dataclass(frozen=True)
class Stream:
    """An endless stream of samples: tasks in their proportions, each shuffled anew every epoch."""

    tasks: tuple[Component, ...]
    rates: tuple[float, ...]
    split: str
    seed: int
    options: InputOptions


def make_stream(components: Sequence[tuple[Component, float]], split: str, seed: int, options: InputOptions) -> Stream:
    """Checks that the samples fit the rows, and puts the largest task first.

    Raises:
      InputError: when options contradict one another, a row is too short for a sample, or a task has no examples.
    """
    lengths = options.task_feature_lengths
    if options.batch_size < 1 or options.num_shards() < 1 or options.batch_size % options.num_shards():
        raise InputError(f"BATCH_SIZE {options.batch_size} is no multiple of the {options.num_shards()} data shards.")
    smallest = smallest_window(len(components))
    if options.window < smallest:
        raise InputError(
            f"A window of {options.window} samples is too small for {len(components)} tasks: "
            f"--gin.InputOptions.window={smallest}, or more."
        )
    ordered = sorted(components, key=lambda component: -component[1])
    for task, _ in ordered:
        if task.num_examples(split) == 0:
            raise InputError(
                f"Task {task.name} has no {split} examples: users may have too few interactions, or a task of one's "
                "own no such split (EVAL_PERIOD=0 needs no validation)."
            )
        for feature, needed in task.shortest_row().items():
            if lengths[feature] < needed:
                raise InputError(
                    f"TASK_FEATURE_LENGTHS {feature}={lengths[feature]} is too short for {task.name}: "
                    f"{'one item and the question' if feature == 'inputs' else 'a target'} may need {needed}. Give "
                    "longer rows, or a smaller MAX_ITEM_TOKENS."
                )
    return Stream(tuple(t for t, _ in ordered), tuple(r for _, r in ordered), split, seed, options)


def smallest_window(num_tasks: int) -> int:
    """Below this a task's count could fall from one window to the next, see `counts_before`."""
    return max(1, num_tasks * (num_tasks - 1))


def counts_before(rates: Sequence[float], n: int) -> np.ndarray:
    """How many of the first n samples belong to each task, int64 [tasks]; the first task takes the remainder.

    The count of a task is never off its share by more than the number of tasks. The first task's can fall by less
    than that number from n to n + 1 when there are three or more; over a window it can't.
    """
    counts = np.floor(np.asarray(rates) * n).astype(np.int64)
    counts[0] = n - counts[1:].sum()
    return counts


@functools.lru_cache(maxsize=64)
def _shuffled(count: int, seed: int) -> grain.MapDataset:
    """Endless positions -> 0 .. count - 1, a new permutation every epoch, each found without the others."""
    return grain.MapDataset.range(count).shuffle(seed=seed).repeat()


def addresses(stream: Stream, window: int) -> list[tuple[int, int, int]]:
    """The samples of a window: (task number, epoch, index in the epoch)."""
    size = stream.options.window
    first, last = counts_before(stream.rates, window * size), counts_before(stream.rates, (window + 1) * size)
    found = []
    for number, task in enumerate(stream.tasks):
        count = task.num_examples(stream.split)
        # By name, so that tasks with equally many examples don't share their orders.
        shuffled = _shuffled(count, zlib.crc32(f"{stream.seed} {task.name}".encode()))
        positions = range(first[number], last[number])
        found += [(number, position // count, shuffled[position]) for position in positions]
    return found


def pack_window(stream: Stream, window: int) -> Batch:
    """Renders and packs one window; its rows stand in a seeded random order."""
    options = stream.options
    lengths = options.task_feature_lengths
    limits = Limits(**lengths)
    where = addresses(stream, window)
    rendered = [
        stream.tasks[task].render(stream.split, index, epoch, stream.seed, limits) for task, epoch, index in where
    ]
    rows = packing.pack(
        [sample.inputs for sample in rendered],
        [sample.targets for sample in rendered],
        np.asarray([task for task, _, _ in where]),
        lengths["inputs"],
        lengths["targets"],
        options.loss_normalization,
    )
    shuffle = np.random.Generator(np.random.Philox(key=[stream.seed, window])).permutation(
        len(rows["encoder_input_tokens"])
    )
    return {name: array[shuffle] for name, array in rows.items()}


class PackedBatches:
    """Iterator over one of `num_parts` equal parts of each batch, with the position after it.

    Yields:
      (batch, positions): arrays of the part's rows, and int64 [shards of the part, 2], the window and row at which
      each shard goes on after this batch.
    """

    def __init__(self, stream: Stream, positions: np.ndarray, part: int = 0, num_parts: int = 1):
        shards = stream.options.num_shards()
        if shards % num_parts:
            raise InputError(
                f"{shards} data shards can't be read in {num_parts} parts, one for all processes that hold the same "
                f"rows: --gin.InputOptions.data_shards={num_parts}, or a multiple of it that divides BATCH_SIZE."
            )
        self._rows = stream.options.batch_size // shards
        self._shards = [
            _Shard(stream, shards, *positions[shard])
            for shard in range(part * shards // num_parts, (part + 1) * shards // num_parts)
        ]

    def __iter__(self) -> Iterator[tuple[Batch, np.ndarray]]:
        return self

    def __next__(self) -> tuple[Batch, np.ndarray]:
        parts = [shard.take(self._rows) for shard in self._shards]
        batch = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return batch, np.asarray([shard.position for shard in self._shards], np.int64)


def start_positions(options: InputOptions) -> np.ndarray:
    """Where a new run begins, int64 [S, 2]: shard s at row 0 of window s."""
    shards = options.num_shards()
    return np.stack([np.arange(shards), np.zeros(shards, np.int64)], axis=1)


def resumed_positions(options: InputOptions, positions: np.ndarray, window: int) -> np.ndarray:
    """Where a run goes on with `positions` [S, 2] of another start, in windows of `window` samples: int64 [S', 2].

    Another number of shards, or another window, goes on behind all windows that were begun: no sample is seen twice,
    and those left in these windows are passed over.
    """
    shards = options.num_shards()
    if len(positions) == shards and window == options.window:
        return positions
    first = -(-(positions[:, 0].max() + 1) * window // options.window)  # rounded up
    windows = first + (np.arange(shards) - first) % shards
    return np.stack([windows, np.zeros(shards, np.int64)], axis=1)


def local_batches(stream: Stream, positions: np.ndarray, sharding: Sharding | None = None) -> PackedBatches:
    """The part of each batch that this process's devices hold, from the positions [S, 2] on.

    Args:
      stream: of samples.
      positions: of all shards.
      sharding: of the batch over the devices of all processes; None for one process.

    Raises:
      InputError: when the data shards can't be shared out.
    """
    if sharding is None:
        return PackedBatches(stream, positions)
    parts = partitioning.row_parts(sharding)
    return PackedBatches(stream, positions, parts[jax.process_index()], len(set(parts.values())))


def put(batch: Batch, sharding: Sharding) -> dict[str, jax.Array]:
    """Moves this process's part of a batch to its devices; returns arrays over all processes."""
    num_parts = len(set(partitioning.row_parts(sharding).values()))

    def over_all(rows: np.ndarray) -> jax.Array:
        # Without the whole shape JAX takes processes that hold the same rows for ones that hold others.
        shape = (num_parts * len(rows), *rows.shape[1:])
        return jax.make_array_from_process_local_data(sharding, rows, shape)

    with jax.transfer_guard("allow"):  # this one is meant
        return jax.tree.map(over_all, batch)


def on_device(
    batches: Iterator[tuple[Batch, np.ndarray]], sharding: Sharding
) -> Iterator[tuple[dict[str, jax.Array], np.ndarray]]:
    """Moves batches to the devices a few steps before they are needed."""
    queue: collections.deque[tuple[dict[str, jax.Array], np.ndarray]] = collections.deque()
    for batch, positions in batches:
        queue.append((put(batch, sharding), positions))
        if len(queue) > BATCHES_AHEAD:
            yield queue.popleft()
    yield from queue


def all_positions(stream: Stream, positions: np.ndarray, sharding: Sharding) -> list[list[int]]:
    """The positions of all shards, [S, 2], from those of this process's part (to be called by all processes)."""
    if len(positions) < stream.options.num_shards():
        parts = partitioning.row_parts(sharding)
        one_of_each = [min(p for p in parts if parts[p] == part) for part in sorted(set(parts.values()))]
        positions = np.asarray(multihost_utils.process_allgather(positions))[one_of_each].reshape(-1, 2)
    return positions.tolist()


class _Shard:
    """Every S-th window, row by row; Grain renders the first one from now on, and the next while one is used."""

    def __init__(self, stream: Stream, num_shards: int, window: int, row: int):
        self._step = num_shards
        self.position = (int(window), int(row))
        self._dropped = threading.Event()
        workers = stream.options.workers
        if workers:
            pack = functools.partial(_in_worker, stream)
        else:
            pack = functools.partial(_in_turn, stream, self._dropped)
        windows = grain.MapDataset.range(int(window), 2**62, num_shards).map(pack)
        prefetched = windows.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
        if workers:
            # Grain's workers read absl's flags, which only absl's own main function parses.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            prefetched = prefetched.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
        self._windows = iter(prefetched)
        self._windows.start_prefetch()
        self._current: Batch | None = None

    def __del__(self) -> None:
        self._dropped.set()

    def take(self, count: int) -> Batch:
        """The next `count` rows, over the end of a window if need be."""
        parts = []
        self._current = self._current or next(self._windows)
        while count:
            window, row = self.position
            available = len(self._current["encoder_input_tokens"])
            if row >= available:
                self._current, self.position = next(self._windows), (window + self._step, 0)
                continue
            taken = min(count, available - row)
            parts.append({name: array[row : row + taken] for name, array in self._current.items()})
            self.position = (window, row + taken)
            count -= taken
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _in_worker(stream: Stream, window: int) -> Batch:
    """`pack_window` in a process of its own, which must not outlive a training that is killed."""
    host.die_with_parent()
    return pack_window(stream, window)


def _in_turn(stream: Stream, dropped: threading.Event, window: int) -> Batch:
    """`pack_window` in a thread. Python waits for its threads before it ends: what nobody waits for isn't rendered."""
    with _ONE_AT_A_TIME:
        return {} if dropped.is_set() else pack_window(stream, window)
