"""What is logged of a step: means from sums, and speed."""

import contextlib
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from recalign_jax import hardware, terminal


def means(sums: dict[str, Any], names: list[str]) -> dict[str, float]:
    """Means from sums: loss a sample (or token), overall and of each task, and how full the rows were."""
    values = {
        "loss": float(sums["loss"] / sums["weight"]),
        "z_loss": float(sums["z_loss"] / sums["weight"]),
        "packing_efficiency": float(sums["input_tokens"] / sums["slots"]),
    }
    if "steps" in sums:
        values["gradient_norm"] = float(sums["gradient_norm"] / sums["steps"])
    for task, name in enumerate(names):
        if len(names) > 1 and sums["task_weight"][task] > 0:
            values[f"loss/{name}"] = float(sums["task_loss"][task] / sums["task_weight"][task])
            values[f"target_token_share/{name}"] = float(sums["task_tokens"][task] / sums["target_tokens"])
    return values


class Speed:
    """Useful tokens a second, without the time of compilation, evaluation and saving.

    Args:
      mesh: the devices.
      step_flops: floating-point operations of a step by the model's arithmetic, padding included, recomputation not.
    """

    def __init__(self, mesh: jax.sharding.Mesh, step_flops: float) -> None:
        peak = hardware.peak_flops(mesh.devices.flat[0].device_kind)
        self._peak_flops, self._step_flops = peak and peak * mesh.size, step_flops
        self._since: float | None = None
        self._waited = self._tokens = self._seconds = 0.0

    def restart(self) -> None:
        """Training goes on from here."""
        self._since, self._waited = time.monotonic(), 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, the loop waits for input."""
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    def rates(self, sums: dict[str, np.ndarray]) -> dict[str, float]:
        """Since `restart`; nothing before the first one, since that time holds the compilation."""
        if self._since is None:
            return {}
        seconds = time.monotonic() - self._since
        tokens = float(sums["input_tokens"] + sums["target_tokens"])
        self._tokens += tokens
        self._seconds += seconds
        rates = {
            "tokens_per_second": tokens / seconds,
            "steps_per_second": float(sums["steps"]) / seconds,
            "input_wait_share": self._waited / seconds,
        }
        if self._peak_flops:
            rates["mfu"] = rates["steps_per_second"] * self._step_flops / self._peak_flops
        return rates

    def overall(self) -> float | None:
        """Tokens a second since the process began; None after a single step."""
        return self._tokens / self._seconds if self._seconds else None


@contextlib.contextmanager
def tracing(profile: tuple[int, int] | None, model_dir: str) -> Iterator[Callable[[int, Any], None]]:
    """Yields a function to be called before every step, which starts and ends a trace in MODEL_DIR/profile.

    It takes the number of the step in this process, from 1, and the state: what was asked for before is waited for.
    """
    folder = str(pathlib.Path(model_dir) / "profile")
    running = False

    def turn(on: bool) -> None:
        nonlocal running
        if on and not running:
            jax.profiler.start_trace(folder)
        elif running and not on:
            jax.profiler.stop_trace()
            terminal.say(f"A trace is in {folder}; TensorBoard's profile plugin and XProf show it.")
        running = on

    def trace(number: int, state: Any) -> None:
        if profile is not None and number in (profile[0] + 1, sum(profile) + 1):
            jax.block_until_ready(state)
            turn(number == profile[0] + 1)

    try:
        yield trace
    finally:
        turn(False)
