"""What a compiled step moves between devices, read off its HLO text."""

import math
import re
from typing import NamedTuple

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%(\S+) = (.*?) ([a-z][\w-]*)\((.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%(\S+) \(.*\{$")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(calls|to_apply|branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)")
_COLLECTIVE = re.compile(rf"({'|'.join(KINDS)})(-start)?")


class _Instruction(NamedTuple):
    type: str
    opcode: str
    rest: str  # operands and attributes


def bytes_moved(hlo: str) -> dict[str, int]:
    """Bytes that each kind of collective brings to one device in one run of a compiled program.

    A collective counts the array that a device has afterwards (of a reduce-scatter, before), an all-reduce counts
    it twice, as it is a reduce-scatter and an all-gather. What stands in a loop counts for every turn.

    Args:
      hlo: the compiled module's text.
    """
    computations, entry = _parse(hlo)
    moved = dict.fromkeys(KINDS, 0)
    fused: set[str] = set()  # channels: an asynchronous collective stands in every fusion that works beside it

    def visit(name: str, times: int, fusion: bool) -> None:
        body = computations[name]
        for instruction in body.values():
            collective = _COLLECTIVE.fullmatch(instruction.opcode)
            if collective:
                channel = re.search(r"channel_id=(\d+)", instruction.rest)
                if fusion and channel:
                    if channel[1] in fused:
                        continue
                    fused.add(channel[1])
                # On TPU a reduce-scatter is an all-reduce in a fusion of that name.
                kind = "reduce-scatter" if "all-reduce-scatter" in name else collective[1]
                moved[kind] += times * _moved(kind, collective[2] is not None, instruction, body)
            elif instruction.opcode == "while":
                inner = re.search(r"body=%([\w.\-]+)", instruction.rest)
                assert inner is not None
                visit(inner[1], times * _turns(instruction, body, computations), fusion)
            else:
                for _, called in _CALLED.findall(instruction.rest):
                    for inner_name in re.findall(r"%([\w.\-]+)", called):
                        visit(inner_name, times, fusion or instruction.opcode == "fusion")

    visit(entry, 1, False)
    return moved


def _parse(hlo: str) -> tuple[dict[str, dict[str, _Instruction]], str]:
    """(computation -> instruction -> what it is, name of the entry computation)."""
    computations: dict[str, dict[str, _Instruction]] = {}
    entry, body = "", {}
    for line in hlo.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            body = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
            continue
        found = _INSTRUCTION.match(line)
        if found:
            body["ROOT" if found[1] else found[2]] = _Instruction(found[3], found[4], found[5])
    return computations, entry


def _moved(kind: str, is_start: bool, instruction: _Instruction, body: dict[str, _Instruction]) -> int:
    size = _size(instruction.type)
    operands = sum(_size(body[name].type) for name in _operands(instruction) if name in body)
    if is_start and kind in ("all-gather", "collective-permute"):
        return size - operands  # its type holds the operands too
    if kind == "reduce-scatter" and instruction.opcode == "reduce-scatter":
        return operands
    return 2 * size if kind == "all-reduce" else size


def _size(type_: str) -> int:
    """Bytes of an array, or of all arrays of a tuple."""
    return sum(
        math.prod(int(n) for n in shape.split(",") if n) * (1 if dtype == "pred" else _bits(dtype) // 8 or 1)
        for dtype, shape in _ARRAY.findall(type_)
    )


def _bits(dtype: str) -> int:
    found = re.search(r"\d+", dtype)
    return int(found[0]) if found else 8


def _operands(instruction: _Instruction) -> list[str]:
    return re.findall(r"%([\w.\-]+)", instruction.rest.split(")", 1)[0])


def _turns(loop: _Instruction, body: dict[str, _Instruction], computations: dict) -> int:
    """How often a loop turns: as XLA says, else from its counter, which starts at a constant and is compared with one.

    A loop that can't be read so counts once.
    """
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
    if known:
        return int(known[1])
    condition, inner = (computations[re.search(rf"{role}=%([\w.\-]+)", loop.rest)[1]] for role in ("condition", "body"))  # type: ignore[index]
    constants = [limit for limit in map(_constant, condition.values()) if limit is not None]
    counters = [re.search(r"index=(\d+)", found.rest) for found in condition.values()]
    index = next((int(counter[1]) for counter in counters if counter), None)
    if len(constants) != 1 or index is None:
        return 1
    start = _element(body[_operands(loop)[0]], index, body)
    step = inner.get(_operands(inner["ROOT"])[index])
    added = [_constant(inner[name]) for name in _operands(step) if name in inner] if step else []
    size = next((value for value in added if value), 1)
    return max(1, -(-(constants[0] - (start or 0)) // size))


def _element(tuple_: _Instruction, index: int, body: dict[str, _Instruction]) -> int | None:
    names = _operands(tuple_)
    return _constant(body[names[index]]) if index < len(names) and names[index] in body else None


def _constant(instruction: _Instruction) -> int | None:
    found = re.match(r"(-?\d+)\)", instruction.rest) if instruction.opcode == "constant" else None
    return int(found[1]) if found else None
