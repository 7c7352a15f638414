"""What a run will take, before it starts: arithmetic over a recipe, standard library only."""

from __future__ import annotations

from argonne.plan.devices import Device, device, device_names, device_peak_flops
from argonne.plan.shape import ModelShape, flops_per_token, shape_of

__all__ = ["Device", "ModelShape", "device", "device_names", "device_peak_flops", "flops_per_token", "shape_of"]
