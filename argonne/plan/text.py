"""A plan as lines for people, and a plan beside what a run measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from argonne.plan.build import Plan
from argonne.plan.published import MEASURED, PUBLISHED

GB = 1e9
# Of a record, and of the plan. Records of earlier versions have no mean of the session beside them: they are one.
_RATES = {"tokens_per_second": "tokens_per_second", "mfu": "expected_mfu"}


def plan_lines(plan: Plan) -> list[str]:
    """The table that `argonne plan` prints."""
    name = plan.recipe or plan.preset or "recipe"
    degrees = ", ".join(f"{kind} {degree}" for kind, degree in plan.layout.items() if degree > 1)
    why = (
        "as the recipe says"
        if plan.micro_is_given
        else "the smallest"
        if not plan.fits
        else "the largest that fits, evened out"
    )
    if plan.fits and plan.device == "cpu" and not plan.micro_is_given:
        why = "what a CPU works on at once"
    every = f" {plan.checkpointing_stride}" if plan.activation_checkpointing == "every_nth" else ""
    way = f"activation checkpointing {plan.activation_checkpointing}{every}"
    limit = "" if plan.memory_limit is None else f", of {plan.memory_limit / GB:.1f} GB usable"
    rows = [
        ("model", f"{plan.preset or 'from init_from or own sizes'}, {plan.parameters:,} parameters"),
        ("FLOPs a token", f"{plan.flops_per_token:.4g} ({plan.flops_convention})"),
        ("device", f"{plan.devices} x {plan.device}, {plan.precision}, {degrees or 'one process'}"),
        ("step", f"{plan.tokens_per_step:,} tokens, rows of {plan.sequence_length:,}"),
        ("micro-batch", f"{plan.micro_rows} rows x {plan.micro_batches} a device ({why}), {way}, loss {plan.loss}"),
        ("memory", f"{_bytes(plan.memory_total)} a device at its highest moment ({plan.memory_peak}){limit}"),
        *[("", f"{_bytes(size):>12}  {part}") for part, size in plan.memory.items()],
        *([] if plan.fits else [("DOES NOT FIT", plan.advice or "")]),
        *([("parallel", plan.layout_reason)] if plan.layout_reason else []),
        *([("idle", f"{100 * plan.idle_share:.0f} % of a step, in the pipeline")] if plan.idle_share else []),
        *_traffic_rows(plan),
        *_length_rows(plan),
        *[("source", _source(use)) for use in plan.sources],
    ]
    width = max(len(label) for label, _ in rows)
    lines = [f"plan of {name} ({plan.stage})", *(f"  {label:<{width}}  {text}" for label, text in rows)]
    return [*lines, *(f"  note: {warning}" for warning in plan.warnings)]


def _bytes(size: float) -> str:
    return f"{size / GB:.2f} GB" if size >= GB / 10 else f"{size / 1e6:.1f} MB"


def _traffic_rows(plan: Plan) -> list[tuple[str, str]]:
    if not plan.traffic:
        return []
    total = f"{_bytes(sum(sent['bytes'] for sent in plan.traffic))} a device and step"
    if plan.traffic_seconds is not None:
        total += f", in {_seconds(plan.traffic_seconds)}"
        if plan.tokens_per_second:
            total += f" of a step's {_seconds(plan.tokens_per_step / plan.tokens_per_second)}"
    rows = [("sends", total)]
    for sent in plan.traffic:
        where = "within a node" if sent["in_a_node"] else "between nodes"
        speed = f" at an assumed {sent['bytes_per_second'] / GB:,.4g} GB/s" if sent["bytes_per_second"] else ""
        kind = f"{sent['kind']} over {sent['over']} {sent['ranks']}"
        rows.append(("", f"{_bytes(sent['bytes']):>12}  {kind}, {where}{speed}"))
    return rows


def _seconds(time: float) -> str:
    return f"{time:.2f} s" if time >= 0.1 else f"{1000 * time:.2g} ms"


def _length_rows(plan: Plan) -> list[tuple[str, str]]:
    if plan.steps is None or plan.tokens is None:
        return [("length", "not known: it is in epochs of data that is not here")]
    rows = [("length", f"{plan.steps:,} steps, {plan.tokens:,} tokens")]
    if plan.tokens_per_second is not None and plan.hours is not None and plan.device_hours is not None:
        basis = (
            "the sustained rate of the note" if plan.expected_mfu is None else f"{100 * plan.expected_mfu:.0f} % MFU"
        )
        rows.append(("speed", f"{plan.tokens_per_second:,.0f} tokens/s, assuming {basis}"))
        long = f"{plan.hours:,.1f} hours" if plan.hours < 72 else f"{plan.hours / 24:,.1f} days"
        time = f"{60 * plan.hours:.1f} minutes" if plan.hours < 2 else long
        rows.append(("time", f"{time}, {plan.device_hours:,.1f} device-hours"))
    if plan.cost is not None:
        rows.append(("cost", f"{plan.cost:,.2f}"))
    if plan.published_hours is not None:
        rows.append(("published", f"{plan.published_hours:,.0f} hours on {PUBLISHED[plan.recipe or ''].devices}"))
    for run in MEASURED if plan.expected_mfu is not None else ():
        of = f"{run.tokens_per_second:,} tokens/s of {run.release} on {run.devices} x {run.device}, by earlier code"
        rows.append(("past error", f"the same arithmetic gives {plan.past_errors[run.release]:.1f} times the {of}"))
    return rows


def _source(use: dict[str, Any]) -> str:
    known = (
        "tokens not known"
        if use["tokens"] is None
        else f"{use['tokens']:,} tokens{'' if use['here'] else ' as released'}"
    )
    passes = "" if use["passes"] is None else f", read {use['passes']:.3g} times"
    return f"{use['path']}: {100 * use['share']:.0f} % of the tokens, {known}{passes}"


def compare_plan(plan: dict[str, Any], records: Sequence[dict[str, Any]], hours: float | None) -> list[dict[str, Any]]:
    """What was planned beside what a run measured: [{name, planned, measured, ratio}], ratio = measured / planned.

    plan: `Plan.to_dict()` as stored with the run. records, hours: of its metrics.jsonl, as they count and in order. A
    figure that either side lacks is None.
    """
    steps = [record for record in records if record["event"] == "step"]
    last = steps[-1] if steps else {}
    memory = max((record["memory_gb"] for record in steps if record.get("memory_gb") is not None), default=None)
    triples = [
        ("memory_gb", plan["memory_total"] / GB, memory),
        *((name, plan[planned], last.get(f"{name}_mean", last.get(name))) for name, planned in _RATES.items()),
        ("steps", plan["steps"], last.get("step")),
        ("tokens", plan["tokens"], last.get("tokens")),
        ("hours", plan["hours"], hours),
    ]
    return [
        {
            "name": name,
            "planned": planned,
            "measured": found,
            "ratio": found / planned if planned and found is not None else None,
        }
        for name, planned, found in triples
    ]
