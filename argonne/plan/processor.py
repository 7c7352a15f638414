"""What the processor can do, as Linux tells it, read without a library. Elsewhere nothing is known, nothing assumed."""

from __future__ import annotations

from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")
# Of x86: dot products of bf16 pairs in vectors of 512 bits, and in tiles.
BF16 = frozenset({"avx512_bf16", "amx_bf16"})
AMD = "AuthenticAMD"


def _told(name: str) -> str:
    """The value of the first line `name : value`."""
    try:
        lines = CPU_INFO.read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name), "")


def multiplies_bf16() -> bool:
    """Are its matrix products in bf16 faster than in fp32?"""
    return bool(BF16 & set(_told("flags").split()))


def vendor() -> str:
    return _told("vendor_id")
