"""How runs and evaluations are called on the page; the seeds of one run are called alike."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from recalign_jax.reporting.runs import Evaluation, Run


def labels_of(
    runs: Sequence[Run], evaluations: Sequence[Evaluation], corpus_of: Callable[[Run | Evaluation], str]
) -> dict[Run | Evaluation, str]:
    """How runs, and evaluations without one, are called: a training by its folder, a baseline by its method.

    Runs that differ in their seed alone have one label. Where different ones of a corpus would have the same, their
    folders tell them apart.
    """
    groups: dict[Any, list[Run | Evaluation]] = {}
    for run in runs:
        groups.setdefault(_but_for_the_seed(run), []).append(run)
    for members in list(groups.values()):
        seeds = [member.seed for member in members if isinstance(member, Run)]
        if len(set(seeds)) < len(seeds):  # the same again is no other seed
            groups |= {id(member): [member] for member in members}
            members.clear()
    for evaluation in evaluations:
        if evaluation.run is None:
            groups[id(evaluation)] = [evaluation]
    short: dict[tuple[str, str], list[list[Run | Evaluation]]] = {}
    for members in filter(None, groups.values()):
        short.setdefault((corpus_of(members[0]), _method(members[0]) or "/".join(_parts(members))), []).append(members)
    labels: dict[Run | Evaluation, str] = {}
    for (_, label), same in short.items():
        called = [_told_apart(label, _parts(members), [_parts(one) for one in same]) for members in same]
        for members, name in zip(same, called, strict=True):
            chosen = label if len(same) == 1 else name if called.count(name) == 1 else _names(members)
            labels |= dict.fromkeys(members, chosen)
    return labels


def _told_apart(label: str, parts: list[str], of_all: list[list[str]]) -> str:
    """A label that several have, with the parts of the path that not all of them have."""
    shown = "/".join(part for part in parts if not all(part in others for others in of_all))
    return shown if label in shown else f"{label} ({shown})" if shown else label


def _names(members: Sequence[Run | Evaluation]) -> str:
    """What the paths of several don't have in common, one after the other; the path of one."""
    shared = _shared(members) if len(members) > 1 else []
    return ", ".join("/".join(part for part in _path(member) if part not in shared) for member in members)


def _but_for_the_seed(run: Run) -> Any:
    """Equal for runs that differ in nothing but their seed; the run itself while its configuration isn't written."""
    if not run.config:
        return id(run)
    ignored = ("SEED", "MODEL_DIR", "TrainOptions.seed", "train.model_dir", "TrainOptions.model_dir")
    values = {name: repr(value) for name, value in run.values.items() if name not in ignored}
    # What a baseline rates is no setting of gin.
    return run.method, run.identity.get("family"), frozenset(run.corpora.items()), frozenset(values.items())


def _method(one: Run | Evaluation) -> str:
    return one.method if isinstance(one, Run) else one.told.get("method", "")


def _parts(members: Sequence[Run | Evaluation]) -> list[str]:
    """The parts of the path of one run, or those that the paths of several have in common."""
    return _shared(members) or [_names(members)]


def _shared(members: Sequence[Run | Evaluation]) -> list[str]:
    return [column[0] for column in zip(*map(_path, members), strict=False) if len(set(column)) == 1]


def _path(member: Run | Evaluation) -> tuple[str, ...]:
    return pathlib.PurePath(member.name).parts
