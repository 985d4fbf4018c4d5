"""Arrays that are read in slices: what every checkpoint format is turned into before anything else happens.

An array here is anything with `shape`, `dtype` and `array[index]`, where index is a slice (of step 1) for every
dimension: a numpy array is one, a `LazyArray` reads from disk or from a bucket.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import ml_dtypes  # noqa: F401  makes numpy know bfloat16, which safetensors asks for by name
import numpy as np

from recalign_jax.errors import InputError

Index = tuple[slice, ...]


class Array(Protocol):
    """See the module."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...

    def __getitem__(self, index: Any, /) -> Any: ...


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array whose slices are read when they are asked for; nothing is kept."""

    shape: tuple[int, ...]
    dtype: Any
    read: Callable[[Index], np.ndarray]

    def __getitem__(self, index: Index) -> np.ndarray:
        return self.read(index)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(whole(self), dtype)


def whole(array: Array) -> np.ndarray:
    """Reads all of an array."""
    return array[tuple(slice(0, size) for size in array.shape)]


def place(array: Array, target: jax.ShapeDtypeStruct) -> jax.Array:
    """Puts an array onto the devices of `target.sharding`; every shard is read by itself, and by its process alone.

    Shards that several devices hold alike are read once. No more than one shard is in the host's memory at a time.
    """
    devices_of: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in target.sharding.addressable_devices_indices_map(target.shape).items():
        bounds = tuple(
            part.indices(size)[:2] for part, size in zip(index, target.shape, strict=True)
        )  # a slice can't be a key
        devices_of.setdefault(bounds, []).append(device)
    pieces = []
    for bounds, devices in devices_of.items():
        block = np.asarray(array[tuple(slice(*bound) for bound in bounds)], target.dtype)
        pieces += [jax.device_put(block, device) for device in devices]
    return jax.make_array_from_single_device_arrays(target.shape, target.sharding, pieces)


# ---------------------------------------------------------------- safetensors


def open_safetensors(files: Mapping[str, pathlib.Path]) -> dict[str, Array]:
    """Opens the arrays of safetensors files: {name: file that holds it} -> arrays.

    A file is mapped into memory only while a slice is read, so that what was read of it doesn't stay resident.
    Raises InputError for a file that is no safetensors file, and for a name that its file lacks.
    """
    from safetensors import SafetensorError, safe_open

    def open_one(name: str, path: pathlib.Path, shape: tuple[int, ...], dtype: Any) -> LazyArray:
        def read(index: Index) -> np.ndarray:
            with safe_open(path, framework="numpy") as tensors:
                return tensors.get_slice(name)[index] if shape else tensors.get_tensor(name)

        return LazyArray(shape, dtype, read)

    names_of: dict[pathlib.Path, list[str]] = {}
    for name, path in files.items():
        names_of.setdefault(path, []).append(name)
    arrays: dict[str, Array] = {}
    for path, names in names_of.items():
        try:
            with safe_open(path, framework="numpy") as tensors:
                for name in names:
                    if name not in tensors.keys():  # noqa: SIM118  it is no mapping
                        raise InputError(f"{path}: no array {name!r}, though the index says that it is here.")
                    part = tensors.get_slice(name)
                    dtype = SAFETENSORS_DTYPES.get(part.get_dtype())
                    if dtype is None:
                        raise InputError(f"{path}: parameter {name!r} is of type {part.get_dtype()}, which is not one "
                                         f"of {', '.join(SAFETENSORS_DTYPES)}.")  # fmt: skip
                    arrays[name] = open_one(name, path, tuple(part.get_shape()), dtype)
        except SafetensorError as error:
            raise InputError(
                f"{path}: no safetensors file, or damaged ({error}). Download or write it again."
            ) from None
    return arrays


SAFETENSORS_DTYPES = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype("bfloat16"),
}


# ---------------------------------------------------------------- TensorStore


# Of the first look at a bucket. TensorStore's own numbers, which its arrays keep, would try for many minutes.
_FEW_RETRIES = {"gcs_request_retries": {"max_retries": 4, "initial_delay": "500ms", "max_delay": "4s"}}


def open_store(path: str) -> Any:
    """Opens a folder, or a prefix in a bucket (`gs://bucket/path`), as a TensorStore key-value store.

    Raises InputError when it can't be opened.
    """
    import tensorstore

    if "://" in path:
        spec: Any = path.rstrip("/") + "/"
    else:
        spec = {"driver": "file", "path": os.path.abspath(path) + "/"}
    try:
        return tensorstore.KvStore.open(spec, context=tensorstore.Context(_FEW_RETRIES)).result()
    except (ValueError, NotImplementedError) as error:
        raise InputError(
            f"{path}: can't be opened: {error}. A remote checkpoint is given as gs://bucket/path."
        ) from None


def read_file(store: Any, name: str) -> bytes | None:
    """Returns the content of a file of a store, None if there is no such file.

    Raises InputError if it can't be read.
    """
    try:
        result = store.read(name).result()
    except ValueError as error:
        raise InputError(f"{store.url}{name}: can't be read: {error}") from None
    return result.value if result.state == "value" else None


def open_zarrs(specs: Mapping[str, dict[str, Any]]) -> dict[str, Array]:
    """Opens arrays by their TensorStore specs: {name: spec} -> arrays.

    Raises InputError, naming the parameter, for one that can't be opened or (later) read.
    """
    import tensorstore

    def open_one(name: str, future: Any) -> LazyArray:
        try:
            store = future.result()
        except (ValueError, NotImplementedError) as error:
            raise InputError(f"Parameter {name!r} can't be read: {error}") from None

        def read(index: Index) -> np.ndarray:
            try:
                return store[index].read().result()
            except ValueError as error:
                raise InputError(f"Parameter {name!r} can't be read: {error}") from None

        return LazyArray(tuple(store.shape), store.dtype.numpy_dtype, read)

    # A part that a copy lost would be read as zeros. (Those of a kernel that is all zeros are stored.)
    whole_ones = {name: spec | {"fill_missing_data_reads": False} for name, spec in specs.items()}
    futures = {name: tensorstore.open(spec, open=True, read=True) for name, spec in whole_ones.items()}
    return {name: open_one(name, future) for name, future in futures.items()}


def _holds_array(leaf: dict[str, Any]) -> bool:
    return not leaf.get("value_metadata", {}).get("skip_deserialize", False)


def open_orbax(store: Any, where: str, below: str = "") -> dict[str, Array]:
    """Opens the arrays of a tree that Orbax wrote, by their paths ('encoder/layers/mlp/wo/kernel').

    Args:
      store: from `open_store`, of the folder that holds `_METADATA`.
      where: for messages.
      below: what the paths of the arrays to open begin with; they are named by what follows.

    Raises:
      InputError: when there is no tree, or an array in it can't be opened.
    """
    try:
        metadata = json.loads(read_file(store, "_METADATA") or b"")
        # A part of an optimizer without a state is in the tree, too.
        leaves = [leaf for leaf in metadata["tree_metadata"].values() if _holds_array(leaf)]
        keys = [[str(part["key"]) for part in leaf["key_metadata"]] for leaf in leaves]
        ocdbt, driver = metadata.get("use_ocdbt", True), "zarr3" if metadata.get("use_zarr3") else "zarr"
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{where}: not written by Orbax, or damaged: no readable _METADATA ({error!r})") from None
    base = store.spec().to_json()
    specs = {}
    for key in keys:
        name, path = "/".join(key), ".".join(key) + "/"
        inside = {"driver": "ocdbt", "base": base, "path": path} if ocdbt else base | {"path": base["path"] + path}
        if name.startswith(below):
            specs[name.removeprefix(below)] = {"driver": driver, "kvstore": inside}
    return open_zarrs(specs)
