"""What a run will take, before it starts: arithmetic over a recipe, standard library only."""

from __future__ import annotations

from argonne.plan.build import Plan, choose_setup, make_plan, plan_of_run
from argonne.plan.degrees import settle
from argonne.plan.devices import Device, device, device_names, device_peak_flops, running_device
from argonne.plan.memory import Setup
from argonne.plan.shape import ModelShape, flops_per_token, shape_of
from argonne.plan.text import compare_plan, plan_lines

__all__ = [
    "Device",
    "ModelShape",
    "Plan",
    "Setup",
    "choose_setup",
    "compare_plan",
    "device",
    "device_names",
    "device_peak_flops",
    "flops_per_token",
    "make_plan",
    "plan_lines",
    "plan_of_run",
    "running_device",
    "settle",
    "shape_of",
]
