"""SIGTERM, which a scheduler sends before it takes a machine away: a run saves and leaves with its own status."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

from recalign_jax.errors import Preempted

# Until it is raised again what was raised in vain.
AGAIN_SECONDS = 0.05


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
        self._leave_if_told()  # something may have caught what was raised
        before, self._postpones = self._postpones, postpones
        try:
            self._leave_if_told()
            yield
        finally:
            self._postpones = before

    def on_signal(self, *_: object) -> None:
        """The handler, of SIGTERM and of the alarm after `on_unraisable`."""
        self._told = True
        self._leave_if_told()

    def on_unraisable(self, unraisable: Any, otherwise: Callable[[Any], object]) -> None:
        """The hook for what can't be raised: in a `__del__` or a weak reference's callback Preempted would be lost."""
        if isinstance(unraisable.exc_value, Preempted):
            signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)
        else:
            otherwise(unraisable)

    def _leave_if_told(self) -> None:
        if self._told and not self._postpones:
            raise Preempted(Preempted.nothing_to_save)


@contextlib.contextmanager
def handled() -> Iterator[Preemption]:
    """Minds SIGTERM while the block runs."""
    preemption = Preemption()
    if jax.process_count() > 1:
        yield preemption
        return
    signals = (signal.SIGTERM, signal.SIGALRM)
    before = [signal.signal(number, preemption.on_signal) for number in signals]
    hook = sys.unraisablehook
    sys.unraisablehook = lambda unraisable: preemption.on_unraisable(unraisable, hook)
    try:
        yield preemption
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = hook
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
