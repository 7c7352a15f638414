"""What Linux tells of a processor, and the precision that follows from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from argonne.errors import InputError
from argonne.plan import processor
from argonne.plan.devices import WIDE_ON_CPU, resolve_precision

GENOA = "processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t\t: fpu avx2 avx512f avx512_bf16\n\nprocessor\t: 1\n"


@pytest.mark.parametrize(
    ("flags", "has"),
    [("fpu avx2 avx512_bf16", True), ("fpu amx_bf16 amx_tile", True), ("fpu avx2 avx512f", False), ("", False)],
)
def test_bf16_is_known_by_the_processor_s_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, has: bool
) -> None:
    told = tmp_path / "cpuinfo"
    told.write_text(f"vendor_id\t: GenuineIntel\nflags\t\t: {flags}\n")
    monkeypatch.setattr(processor, "CPU_INFO", told)
    assert processor.multiplies_bf16() is has


def test_where_nothing_tells_nothing_is_assumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "CPU_INFO", tmp_path / "no such file")
    assert not processor.multiplies_bf16()
    assert processor.vendor() == ""
    told = tmp_path / "cpuinfo"
    told.write_text(GENOA)
    monkeypatch.setattr(processor, "CPU_INFO", told)
    assert processor.multiplies_bf16()
    assert processor.vendor() == processor.AMD


@pytest.mark.parametrize(
    ("device", "has_bf16", "width", "found"),
    [
        ("cpu", True, WIDE_ON_CPU, "bf16"),
        ("cpu", True, WIDE_ON_CPU - 1, "fp32"),
        ("cpu", False, 4096, "fp32"),
        ("h200", True, 32, "bf16"),
        ("v100", False, 4096, "fp32"),
    ],
)
def test_auto_is_bf16_where_the_device_has_it_and_a_cpu_s_model_is_wide(
    device: str, has_bf16: bool, width: int, found: str
) -> None:
    assert resolve_precision("auto", device, has_bf16=has_bf16, width=width) == found


def test_a_precision_that_was_given_stays() -> None:
    assert resolve_precision("fp32", "cpu", has_bf16=True, width=4096) == "fp32"
    assert resolve_precision("bf16", "cpu", has_bf16=False, width=32) == "bf16"
    with pytest.raises(InputError, match="v100 has no bf16"):
        resolve_precision("bf16", "v100", has_bf16=False, width=32)
