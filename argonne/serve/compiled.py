"""Functions that numba compiles for this processor, run by the threads that torch's own operators run in.

Each thread of the team calls the same function, which takes one piece after the other until none is left.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llvmlite import binding
from numba import cfunc, from_dtype, njit, types

from argonne.serve.instructions import float_of

NEAREST = np.float32(1.5 * 2**23)  # added and taken away again: the nearest whole number
FARTHEST = np.float32(87)  # of which e^x and e^-x are normal numbers
# Of e^x for |x| <= log(2) / 2 (Cephes, expf), and log(2) in two parts, of which n times the first is exact.
SERIES = tuple(np.float32(term) for term in (1.9875691e-4, 1.3981999e-3, 8.3334519e-3, 4.1665795e-2, 1.6666665e-1, 0.5))
SUMS_IN_ANY_ORDER = {"reassoc", "contract"}  # for all lanes at once; the same order each time
LOG2, REST_OF_LOG2 = np.float32(0.693359375), np.float32(-2.12194440e-4)


def structure(name: str, addresses: str, numbers: str = "") -> type[ctypes.Structure]:
    """What a function is told: addresses and sizes, then numbers. `next`: the first piece that nobody has taken yet."""
    fields: list[tuple[str, Any]] = [(field, ctypes.c_int64) for field in (*addresses.split(), "next")]
    fields += [(field, ctypes.c_double) for field in numbers.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


class Team:
    """A function that takes a pointer to such a structure, in all of torch's threads."""

    def __init__(self, function: Callable[..., None], told: type[ctypes.Structure]) -> None:
        binding.initialize_native_asmparser()
        kind = types.void(types.CPointer(from_dtype(np.dtype(told))))
        try:
            self._compiled = cfunc(kind, error_model="numpy", cache=True)(function)
        except RuntimeError:  # there is no folder to keep it in for the next start
            self._compiled = cfunc(kind, error_model="numpy")(function)
        address: Any = self._compiled.address
        self._address, self._alone = address, ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)
        self._run = getattr(ctypes.CDLL(torch._C.__file__), "GOMP_parallel", None)  # not in every OpenMP
        if self._run is not None:
            self._run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            self._run.restype = None

    def __call__(self, told: ctypes.Structure) -> None:
        if self._run is None:
            self._alone(ctypes.addressof(told))
        else:
            self._run(self._address, ctypes.addressof(told), torch.get_num_threads(), 0)


@njit(error_model="numpy")
def exponential(x):  # type: ignore[no-untyped-def]
    """e^x to 2e-7 of it, in arithmetic that a loop does for all lanes at once; beyond FARTHEST that of FARTHEST."""
    x = FARTHEST if x > FARTHEST else x  # so that NaN stays
    x = -FARTHEST if x < -FARTHEST else x
    n = (x * np.float32(1.44269504) + NEAREST) - NEAREST
    rest = (x - n * LOG2) - n * REST_OF_LOG2
    found = SERIES[0]
    for term in SERIES[1:]:
        found = found * rest + term
    power = float_of(np.int32((np.int32(n) + np.int32(127)) << np.int32(23)))
    return (found * rest * rest + rest + np.float32(1)) * power


@njit(fastmath=SUMS_IN_ANY_ORDER, error_model="numpy")
def dot(one, other):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for at in range(len(one)):
        total += one[at] * other[at]
    return total


@njit(error_model="numpy")
def norm_row(x, gain, eps, into):  # type: ignore[no-untyped-def]
    """gain * x / sqrt(mean(x^2) + eps), written to `into`."""
    by = np.float32(1) / np.sqrt(dot(x, x) / np.float32(len(x)) + np.float32(eps))
    for at in range(len(x)):
        into[at] = x[at] * by * gain[at]
