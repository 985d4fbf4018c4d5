"""SIGTERM, which a scheduler sends before it takes a machine away: a run saves and leaves with its own status."""

import contextlib
import signal
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

from recalign_jax.errors import Preempted


class Preemption:
    """Whether the run was told to leave.

    One process: Python's signal handler. It raises Preempted at once, except inside `postponed`, where `requested`
    tells. Several processes: JAX's own handler, since all must leave after the same step.
    """

    def __init__(self) -> None:
        self._postpones = self._told = False

    def requested(self, step: int) -> bool:
        """Whether to save and leave after this step; to be asked once after every step, by all processes."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._told

    @contextlib.contextmanager
    def postponed(self, postpones: bool = True) -> Iterator[None]:
        """What must not be cut off stands inside; and inside of that, with False, what may be."""
        before, self._postpones = self._postpones, postpones
        try:
            self._leave_if_told()
            yield
        finally:
            self._postpones = before

    def on_signal(self, *_: object) -> None:
        """The handler."""
        self._told = True
        self._leave_if_told()

    def _leave_if_told(self) -> None:
        if self._told and not self._postpones:
            raise Preempted("SIGTERM: left with nothing to save. The same command goes on.")


@contextlib.contextmanager
def handled() -> Iterator[Preemption]:
    """Minds SIGTERM while the block runs."""
    preemption = Preemption()
    if jax.process_count() > 1:
        yield preemption
        return
    before: Callable[..., object] | int | None = signal.signal(signal.SIGTERM, preemption.on_signal)
    try:
        yield preemption
    finally:
        signal.signal(signal.SIGTERM, before)
