"""Devices by name: memory, and the dense peak of their matrix units. What a plan and the trainer's MFU divide by."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from argonne.errors import InputError

GIB = 1024**3
TERA = 1e12


@dataclass(frozen=True)
class Device:
    """One accelerator, or a CPU.

    `bf16`, `fp16`, `tf32`: dense peak in FLOP/s with fp32 accumulation, no sparsity; None where there is no such unit.
    `memory`: bytes a process can allocate. `matches`: words that all occur in what the driver calls it. `expected_use`: the share of the
    peak that a plan assumes for this trainer, an assumption and printed as one. `sustained`: FLOP/s assumed where no peak is known.
    """

    name: str
    memory: float | None
    bf16: float | None
    fp16: float | None
    tf32: float | None
    matches: tuple[str, ...] = ()
    expected_use: float = 0.4
    sustained: float | None = None


def _gpu(
    name: str, gib: float, bf16: float | None, tf32: float | None, *matches: str, fp16: float | None = None, use: float = 0.4
) -> Device:
    half = fp16 if fp16 is not None else bf16
    return Device(name, gib * GIB, bf16 and bf16 * TERA, half and half * TERA, tf32 and tf32 * TERA, matches, use)


# NVIDIA's data sheets give the peak with sparsity for Hopper, Ada and Blackwell: these are half of it. Memory is what the driver reports as
# total, a little under the name. More specific names stand before less specific ones: the first match counts.
_DEVICES = (
    _gpu("b200", 178, 2250, 1125, "b200"),  # HGX B200 data sheet, per GPU: 4,500 bf16 sparse
    _gpu("gh200", 94.5, 989.4, 494.7, "gh200"),  # GH200 data sheet, 96 GB part: 1,979 bf16 sparse
    _gpu("h200", 139.8, 989.4, 494.7, "h200"),  # H200 SXM data sheet: 1,979 bf16 sparse; 143,771 MiB less what the driver keeps
    _gpu("h100-nvl", 93.1, 835.5, 417.5, "h100", "nvl"),  # H100 NVL data sheet: 1,671 bf16 sparse
    _gpu("h100-pcie", 79.2, 756.5, 378, "h100", "pcie"),  # H100 PCIe data sheet: 1,513 bf16 sparse
    _gpu("h100", 79.2, 989.4, 494.7, "h100"),  # H100 SXM data sheet: 1,979 bf16 sparse
    _gpu("a100-80gb", 79.2, 312, 156, "a100", "80gb", use=0.45),  # A100 data sheet: 312 bf16 dense
    _gpu("a100-40gb", 39.4, 312, 156, "a100", use=0.45),  # the same chip
    _gpu("l40s", 44.4, 362, 183, "l40s"),  # L40S data sheet: 733 bf16 sparse (362 dense)
    _gpu("a6000", 47.5, 154.8, 77.4, "rtx", "a6000"),  # GA102 white paper: 154.8 fp16 with fp32 accumulation
    _gpu("a10g", 22.1, 70, 35, "a10g"),  # AWS's A10 variant: 70 bf16 dense
    _gpu("a10", 22.1, 125, 62.5, "a10"),  # A10 data sheet: 125 bf16 dense
    _gpu("l4", 22.1, 121, 60, "l4"),  # L4 data sheet: 242 bf16 sparse
    _gpu("rtx-5090", 31.4, 209.5, 104.8, "5090"),  # RTX Blackwell white paper: 209.5 bf16 with fp32 accumulation, dense
    _gpu("rtx-4090", 23.5, 165.2, 82.6, "4090"),  # Ada white paper: 165.2 bf16 with fp32 accumulation, dense
    _gpu("rtx-3090", 23.6, 71, 35.6, "3090"),  # GA102 white paper: 71 bf16 with fp32 accumulation, dense
    _gpu("v100", 31.7, None, None, "v100", fp16=125),  # V100 data sheet: 125 fp16; no bf16
    _gpu("t4", 14.6, None, None, "t4", fp16=65),  # T4 data sheet: 65 fp16; no bf16
    # No peak is known for a CPU. 50 GFLOP/s is what two ordinary server cores sustain in fp32 in a whole training step (docs/plan.md).
    Device("cpu", None, None, None, None, ("cpu",), 0.0, 50e9),
)
_ALIASES = {"24gb": "rtx-4090", "4090": "rtx-4090", "3090": "rtx-3090", "5090": "rtx-5090", "a100": "a100-80gb", "h100-sxm": "h100"}


def device_names() -> list[str]:
    return [device.name for device in _DEVICES]


def device(name: str) -> Device:
    """The device of this name or alias. Raises InputError with the names there are."""
    wanted = name.lower().replace("_", "-").replace(" ", "-")
    wanted = _ALIASES.get(wanted, wanted)
    for known in _DEVICES:
        if known.name == wanted:
            return known
    if (found := find_device(name)) is not None:
        return found
    near = difflib.get_close_matches(wanted, [*device_names(), *_ALIASES], n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise InputError(f"--gpu: no device {name!r}; {hint}known: {', '.join(device_names())}")


def find_device(reported: str) -> Device | None:
    """The device that a driver reports as, for example, `NVIDIA A100-SXM4-80GB`; None where it is not known."""
    words = reported.lower().replace("-", " ").replace("_", " ").split()
    for known in _DEVICES:
        if all(word in words for word in known.matches):
            return known
    return None


def resolve_precision(precision: str, device: str, *, has_bf16: bool) -> str:
    """What a precision of the recipe comes to: `auto` is bf16 on a GPU that has it, else fp32.

    device: "cpu", or a GPU by any name. Raises InputError for bf16 on a GPU that has none.
    """
    on_gpu = device != "cpu"
    if precision == "auto":
        return "bf16" if on_gpu and has_bf16 else "fp32"
    if precision.startswith("bf16") and on_gpu and not has_bf16:
        raise InputError(f"train.precision: found {precision}, but {device} has no bf16; use fp16 or fp32")
    return precision


def peak_of(known: Device, precision: str) -> float | None:
    """Dense peak in FLOP/s for a resolved precision (fp32 runs as TF32)."""
    return {"bf16": known.bf16, "bf16_full": known.bf16, "fp16": known.fp16, "fp32": known.tf32}[precision]


def device_peak_flops(name: str, precision: str) -> float | None:
    """Dense peak in FLOP/s of the device a driver reports by `name`; None where it is not known, so that MFU reads n/a."""
    known = find_device(name)
    return None if known is None else peak_of(known, precision)
