"""What chips can do, by the name that JAX has for them (`device_kind`).

Figures are of one JAX device, dense bfloat16. Sources: TPU, docs.cloud.google.com/tpu/docs/{v3,v4,v5e,v5p,v6e,tpu7x};
NVIDIA, the data sheets of A100, H100 and H200 (half of the FLOP/s that they give "with sparsity"). Memory of a TPU is
what its compiler hands out, from libtpu 0.0.42's answers; of a GPU, that of the data sheet.
"""

import re
from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    """What one device has."""

    peak_flops: float  # bfloat16 FLOP/s
    hbm_bytes: int
    hbm_bandwidth: float  # bytes/s
    interconnect: float  # bytes/s over all links of the device to its neighbours, both directions together


def _chip(tflops: float, gib: float, hbm_gigabytes: float, link_gigabytes: float) -> Chip:
    return Chip(tflops * 1e12, int(gib * GIB), hbm_gigabytes * 1e9, link_gigabytes * 1e9)


# Pattern of the whole `device_kind` -> chip.
CHIPS: tuple[tuple[str, Chip], ...] = (
    # A chip of v3 is two devices: 123 TFLOP/s, 900 GB/s; 340 TB/s of all-reduce in a pod of 1,024 chips.
    (r"TPU v3", _chip(61.5, 15.48, 450, 166)),
    # 275 TFLOP/s, 32 GiB, 1,200 GB/s; 1.1 PB/s of all-reduce in a pod of 4,096 chips.
    (r"TPU v4", _chip(275, 30.75, 1200, 269)),
    (r"TPU v5 lite|TPU v5e", _chip(197, 15.75, 819, 400)),
    (r"TPU v5|TPU v5p", _chip(459, 95.74, 2765, 1200)),
    (r"TPU v6 lite|TPU v6e", _chip(918, 31.25, 1638, 800)),
    # A chip of TPU7x is two devices: 2,307 TFLOP/s, 192 GiB, 7,380 GB/s, 1,200 GB/s.
    (r"TPU7x", _chip(1153.5, 94.75, 3690, 600)),
    (r"NVIDIA A100.*40GB.*", _chip(312, 40e9 / GIB, 1555, 600)),
    (r"NVIDIA A100.*80GB.*", _chip(312, 80e9 / GIB, 2039, 600)),
    (r"NVIDIA H100 PCIe", _chip(756, 80e9 / GIB, 2000, 600)),
    (r"NVIDIA H100 NVL", _chip(835, 94e9 / GIB, 3938, 600)),
    (r"NVIDIA H100.*", _chip(989, 80e9 / GIB, 3350, 900)),
    (r"NVIDIA H200 NVL", _chip(835, 141e9 / GIB, 4800, 900)),
    (r"NVIDIA H200.*", _chip(989, 141e9 / GIB, 4800, 900)),
)


def chip(device_kind: str) -> Chip | None:
    """The chip of that name; None when it isn't known."""
    return next((found for pattern, found in CHIPS if re.fullmatch(pattern, device_kind)), None)


def peak_flops(device_kind: str) -> float | None:
    """bfloat16 FLOP/s of one device at most; None when the device isn't known."""
    found = chip(device_kind)
    return found and found.peak_flops
