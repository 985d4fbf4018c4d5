"""Low-rank adaptation (LoRA, Hu et al. 2021, arXiv:2106.09685) as functions of a tree of parameters.

A kernel W [inputs, outputs] becomes W + alpha / rank * A @ B, with adapters A [inputs, rank] and B [rank, outputs] that
are trained while W stays as it is; in a stack of layers each layer has its own. The model never learns of it: it is
run on merged parameters. (No library fits: qwix doesn't reach into scanned layers, peft is for torch, and jax-lorax
stands still since 2024.)
"""

import dataclasses
import math
from typing import Any

import gin
import jax
import jax.numpy as jnp
from flax import traverse_util

from recalign_jax.errors import InputError, did_you_mean

_KERNEL = "/kernel"


@gin.configurable
@dataclasses.dataclass(frozen=True)
class LoraOptions:
    """Which kernels have adapters, and how large.

    Attributes:
      rank: of the adapters; 0 for none, every parameter is trained.
      alpha: the product of the adapters counts alpha / rank times.
      targets: names of layers with a kernel, as 'query', 'key', 'value', 'out', 'wi_0', 'wi_1', 'wo'.

    Raises:
      InputError: for values that can't be.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: tuple[str, ...] = ("query", "value")

    @property
    def trained(self) -> tuple[str, ...] | None:
        """The layers that are trained alone; None where every parameter is."""
        return self.targets if self.rank else None

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 0:
            raise InputError(f"LORA_RANK is {self.rank!r}: must be a whole number, 0 for no adapters.")
        if not self.alpha > 0:
            raise InputError(f"LORA_ALPHA is {self.alpha!r}: must be above 0.")
        if isinstance(self.targets, str) or not self.targets:
            raise InputError(f"LORA_TARGETS is {self.targets!r}: must name layers, as in ('query', 'value').")


def init_adapters(params: Any, options: LoraOptions, key: jax.Array) -> dict[str, Any]:
    """New adapters: A is normal with variance 1 / inputs, B is zero, so that the model starts as its base.

    Args:
      params: the base, or its shapes.
      options: with a rank above 0.
      key: of A.

    Returns:
      A tree like `params` with nothing but the targeted kernels, each a dict of float32 `a` [..., inputs, rank] and
      `b` [..., rank, outputs], where ... are stacked layers.

    Raises:
      InputError: for a target that no kernel has.
    """
    adapters = {}
    for number, (path, kernel) in enumerate(sorted(_targeted(params, options).items())):
        *layers, inputs, outputs = kernel.shape
        normal = jax.random.normal(jax.random.fold_in(key, number), (*layers, inputs, options.rank), jnp.float32)
        b = jnp.zeros((*layers, options.rank, outputs), jnp.float32)
        adapters[path] = {"a": normal / math.sqrt(inputs), "b": b}
    return traverse_util.unflatten_dict(adapters, sep="/")


def merge(base: Any, trained: Any, options: LoraOptions) -> Any:
    """The parameters to run the model on: W + alpha / rank * A @ B where there are adapters, else W itself.

    Args:
      base: the parameters that the adapters belong to; None if there are no adapters.
      trained: the adapters, from `init_adapters`; without base, whole parameters, which are returned.
      options: as they were for `init_adapters`.
    """
    if base is None:
        return trained
    merged, adapters = (traverse_util.flatten_dict(tree, sep="/") for tree in (base, trained))
    # In one order in every process: with another the program would be another.
    for path in dict.fromkeys(path.rsplit("/", 1)[0] for path in adapters):
        a, b = adapters[f"{path}/a"], adapters[f"{path}/b"]
        # So few operations that they may be exact also where the default is bfloat16.
        product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        merged[path] = merged[path] + options.alpha / options.rank * product
    return traverse_util.unflatten_dict(merged, sep="/")


def _targeted(params: Any, options: LoraOptions) -> dict[str, Any]:
    """The kernels that have adapters, by path."""
    flat = traverse_util.flatten_dict(params, sep="/")
    kernels = {path: path.removesuffix(_KERNEL).rsplit("/", 1)[-1] for path in flat if path.endswith(_KERNEL)}
    known = sorted(set(kernels.values()))
    for target in options.targets:
        if target not in known:
            hint = did_you_mean(target, known)
            raise InputError(f"LORA_TARGETS has {target!r}; the model's kernels are {', '.join(known)}.{hint}")
    return {path: flat[path] for path, name in kernels.items() if name in options.targets}
