"""The device mesh, and which dimension of which array is split over which of its axes.

Two tables say it all: `PARAMETER_AXES` names the dimensions of every parameter, `MESH_AXES` maps those names to the
mesh. Optimizer state follows its parameter (`training.optimizer.state_specs`); batches are split by rows. The model
names the dimensions of its activations itself, where it calls `constrain`.
"""

import collections
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from recalign_jax.errors import InputError, did_you_mean

AXES = ("data", "fsdp", "model")

# Logical axis -> mesh axis. 'data' splits batches only, 'fsdp' batches and parameters, 'model' the width of layers.
MESH_AXES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "layers": None,
    "vocab": "model",
    "embed": "fsdp",
    "heads": "model",  # N, or N * H with heads major
    "mlp": "model",
    "buckets": None,
    "norm": None,
    "rank": None,  # of adapters
}

# Path of a parameter -> its logical axes.
_PARAMETER_AXES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"token_embedder/embedding", ("vocab", "embed")),
    (r"\w+/relpos_bias/rel_embedding", ("heads", "buckets")),
    (r"\w+/layers/\w*attention/(query|key|value)/kernel", ("layers", "embed", "heads")),
    (r"\w+/layers/\w*attention/out/kernel", ("layers", "heads", "embed")),
    (r"\w+/layers/mlp/wi_\d/kernel", ("layers", "embed", "mlp")),
    (r"\w+/layers/mlp/wo/kernel", ("layers", "mlp", "embed")),
    (r"\w+/layers/\w+_layer_norm/scale", ("layers", "norm")),
    (r"\w+/\w+_norm/scale", ("norm",)),
    (r"decoder/logits_dense/kernel", ("embed", "vocab")),
)
# The adapters of a kernel (`model.lora`): `a` has its rows, `b` its columns.
_ADAPTER_AXES = tuple(
    row
    for pattern, axes in _PARAMETER_AXES
    if pattern.endswith("/kernel")
    for row in ((rf"{pattern}/a", (*axes[:-1], "rank")), (rf"{pattern}/b", (*axes[:-2], "rank", axes[-1])))
)
PARAMETER_AXES = (*_PARAMETER_AXES, *_ADAPTER_AXES)


def make_mesh(shape: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh ('data', 'fsdp', 'model') over all devices (or those given).

    Args:
      shape: size of each axis, as {'data': 1, 'fsdp': -1, 'model': 2}. One may be -1: the devices that are left.
        An axis that is absent has size 1.
      devices: default: all devices of all processes.

    Raises:
      InputError: for an unknown axis, a bad size, a product that is not the number of devices, or machines of
        different sizes.
    """
    for name, size in shape.items():
        if name not in AXES:
            raise InputError(f"MESH has no axis {name!r}; its axes are {', '.join(AXES)}.{did_you_mean(name, AXES)}")
        if not isinstance(size, int) or (size < 1 and size != -1):
            raise InputError(
                f"MESH axis {name!r} is {size!r}: must be a positive number, or -1 for the devices that are left"
            )
    devices = jax.devices() if devices is None else devices
    sizes = {name: shape.get(name, 1) for name in AXES}
    open_axes = [name for name, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise InputError(f"MESH has -1 for {' and '.join(open_axes)}; only one axis can take the devices that are left")
    given = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(devices) % given or (not open_axes and given != len(devices)):
        raise InputError(
            f"MESH {dict(shape)} takes {'a multiple of ' if open_axes else ''}{given} devices, but there are "
            f"{len(devices)}. Set one axis to -1 to use all that are there, as in {{'data': -1}}."
        )
    for name in open_axes:
        sizes[name] = len(devices) // given
    types = (AxisType.Auto,) * len(AXES)
    slices = collections.Counter(getattr(device, "slice_index", 0) for device in devices)
    if len(slices) == 1:
        return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=types, devices=devices)
    if len(set(slices.values())) > 1:
        raise InputError(
            f"Machines (or slices) have {min(slices.values())} to {max(slices.values())} devices: MESH needs as many "
            "in each."
        )
    # Several GPU machines or TPU slices: the outer axes span the slow network between them, as far as they can.
    across, left = [], len(slices)
    for size in sizes.values():
        across.append(math.gcd(size, left))
        left //= across[-1]
    within = [size // parts for size, parts in zip(sizes.values(), across, strict=True)]
    grid = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=types)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Lays out x over the mesh of `on_mesh`; without one, or on one device, x stays as it is.

    Left to itself XLA splits activations as the parameters are split: by width, every device holding all rows.

    Args:
      x: an activation.
      axes: the logical axis of each of its dimensions, None for one that is not split.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, _spec(axes, x.shape, mesh))


def on_mesh(function: Callable[..., Any], mesh: Mesh | AbstractMesh) -> Callable[..., Any]:
    """Returns the function with `constrain` meaning this mesh while it is traced."""

    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return wrapped


def param_specs(params: Any, mesh: Mesh) -> Any:
    """Returns the PartitionSpec of every parameter of a model.

    A dimension that its mesh axis doesn't divide evenly (position biases of 6 heads over 4 devices) is not split: that
    costs memory, not correctness, and lets every model run on every mesh.

    Args:
      params: nested dict of arrays or `jax.ShapeDtypeStruct`, as from `abstract_params`.
      mesh: from `make_mesh`.

    Raises:
      ValueError: for a parameter that not exactly one row of `PARAMETER_AXES` describes: the table lacks a row.
    """

    def spec(path: Any, leaf: Any) -> PartitionSpec:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        rows = [axes for pattern, axes in PARAMETER_AXES if re.fullmatch(pattern, name)]
        if len(rows) != 1 or len(rows[0]) != leaf.ndim:
            raise ValueError(f"{name!r} of rank {leaf.ndim} needs one row in PARAMETER_AXES, found {rows}")
        return _spec(rows[0], leaf.shape, mesh)

    return jax.tree_util.tree_map_with_path(spec, params)


def _spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Logical axes as those of the mesh; a dimension that they don't divide evenly is not split."""

    def entry(axis: str | None, size: int) -> str | tuple[str, ...] | None:
        split = MESH_AXES[axis] if axis else None
        names = (split,) if isinstance(split, str) else split or ()
        return split if size % math.prod(mesh.shape[name] for name in names) == 0 else None

    return PartitionSpec(*map(entry, axes, shape))


def with_shardings(params: Any, mesh: Mesh) -> Any:
    """Returns parameters' shapes and dtypes (`jax.ShapeDtypeStruct`) with the shardings of `param_specs`."""
    return jax.tree.map(
        lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)),
        params,
        param_specs(params, mesh),
    )


def shardings_of(tree: Any) -> Any:
    """The shardings of arrays, or of ShapeDtypeStructs that have some."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays [B, ...]: rows are split over 'data' and 'fsdp', whose product must divide B."""
    return NamedSharding(mesh, PartitionSpec(MESH_AXES["batch"]))


@functools.lru_cache(maxsize=8)  # asked of every batch
def row_parts(sharding: Sharding) -> dict[int, int]:
    """Which part of a batch's rows each process holds, {process: part}; the parts are numbered from 0.

    Processes whose devices hold the same rows have the same part, as where the mesh axis `model` spans them. The rows
    of a part need not be neighbours: JAX lays out a mesh by how its devices are wired.

    Args:
      sharding: from `batch_sharding`.

    Raises:
      InputError: when two processes hold some rows in common and others not.
    """
    held: dict[int, set[int]] = collections.defaultdict(set)
    indices: Mapping[Any, Any] = sharding.devices_indices_map((sharding.num_devices,))
    for device, (rows,) in indices.items():
        held[device.process_index].update(range(sharding.num_devices)[rows])
    parts = sorted({tuple(sorted(rows)) for rows in held.values()})
    if sum(map(len, parts)) != sharding.num_devices or len({len(part) for part in parts}) > 1:
        raise InputError(
            "MESH shares out the rows of a batch so that processes hold some in common and others not: make the axis "
            "model a divisor of the devices of a process, or a multiple of them."
        )
    return {process: parts.index(tuple(sorted(rows))) for process, rows in held.items()}


def check_batch_size(macro: str, batch_size: int, mesh: Mesh, microbatches: int = 1) -> None:
    """Raises InputError when the rows of every microbatch can't be split evenly; `macro` is their gin name."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    parts = shards * microbatches
    if batch_size < 1 or batch_size % parts:
        times = f" ({shards}) times GRADIENT_ACCUMULATION ({microbatches})" if microbatches > 1 else ""
        raise InputError(
            f"{macro} is {batch_size}: must be a multiple of {parts}, "
            f"the devices of the mesh axes data and fsdp{times}."
        )
