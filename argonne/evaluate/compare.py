"""`argonne compare`: models on the same items, in pairs, the first against each other one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from argonne.errors import InputError
from argonne.evaluate.pairs import LEVEL, holm, of_ratios, of_shares, smallest_share
from argonne.files import read_json
from argonne.layout import RESULTS

SHOWN = 20  # differing items of a task


def stored(folder: Path) -> dict[str, Any] | None:
    """Results that `argonne eval --out` left in a folder, with their items; None where it is no such folder."""
    if not (folder / RESULTS).is_file():
        return None
    results = read_json(folder / RESULTS)
    for name, values in results["tasks"].items():
        if (file := folder / f"{name}.jsonl").is_file():
            values["items"] = [json.loads(line) for line in file.read_bytes().splitlines()]
    return dict(results)


def compared(results: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each task and other model: difference, interval, p, p corrected over all rows (Holm), the smallest
    difference that so many items show, and the items on which the two differ. Raises InputError where items are missing
    or not the same.
    """
    first, rows = results[0], []
    for other in results[1:]:
        for task in tasks:
            mine, theirs = (_items(one, task) for one in (first, other))
            if [one.get("prompt") for one in mine] != [one.get("prompt") for one in theirs]:
                raise InputError(
                    f"{task}: {first['model']} and {other['model']} were not asked the same items; measure both again "
                    "with the same --data, --limit and --shots"
                )
            rows.append({"task": task, "first": first["model"], "second": other["model"], **_difference(mine, theirs)})
    for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_corrected"] = p
    return rows


def _items(results: Mapping[str, Any], task: str) -> list[dict[str, Any]]:
    items = results["tasks"].get(task, {}).get("items")
    if not items:
        raise InputError(f"{results['model']}: no items of task {task} are kept; measure it with `argonne eval --out`")
    return list(items)


def _difference(mine: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    if "bits" in mine[0]:
        parts = [np.array([item["bits"] for item in items]) for items in (mine, theirs)]
        sizes = np.array([item["bytes"] for item in mine], dtype=np.float64)
        found = of_ratios(parts[0], parts[1], sizes)
        values = [float(part.sum() / sizes.sum()) for part in parts]
        return {"measure": "bits per byte", "values": values, "items": len(mine), **vars(found), "differing": []}
    told = [[_told(item) for item in items] for items in (mine, theirs)]
    right = [[one["right"] for one in part] for part in told]
    found, first_only, second_only = of_shares(*right)
    differing = [
        {"number": number, "asked": str(mine[number].get("asked", "")).strip(), "first": one, "second": two}
        for number, (one, two) in enumerate(zip(*told, strict=True))
        if one["right"] != two["right"]
    ]
    return {
        "measure": "accuracy",
        "values": [float(np.mean(part)) for part in right],
        "items": len(mine),
        **vars(found),
        "first_only": first_only,
        "second_only": second_only,
        "visible": smallest_share(len(mine), max(1, first_only + second_only) / len(mine)),
        "differing": differing,
    }


def is_right(item: Mapping[str, Any]) -> bool:
    return bool(item["correct"]) if "correct" in item else bool(item["chosen"] == item["right"])


def _told(item: Mapping[str, Any]) -> dict[str, Any]:
    """What a model chose or wrote, and whether it is right."""
    answer = item["choices"][item["chosen"]] if "choices" in item else str(item["answer"])
    return {"answer": answer.strip(), "right": is_right(item)}


def visible_before(task: str, items: int) -> str:
    """What can be told of a task of accuracies before anything is measured."""
    return (
        f"{task}: {items:,} items show a difference of {smallest_share(items):.4f} in 4 of 5 comparisons (models that "
        f"differ on half of them); one of {smallest_share(items, 0.1):.4f} where they differ on a tenth"
    )


def lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows for a person."""
    found = []
    for row in rows:
        first, second = row["values"]
        told = "differs" if row["p_corrected"] <= LEVEL else "no difference shown"
        found += [
            f"{row['task']}: {first:.4f} ({row['first']}) and {second:.4f} ({row['second']}), {row['measure']}",
            f"    {row['value']:+.4f} (95 %: {row['low']:+.4f} to {row['high']:+.4f}), p {row['p']:.3g}, corrected "
            f"{row['p_corrected']:.3g}: {told}",
        ]
        if "visible" in row:
            found.append(
                f"    {row['items']:,} items, {row['first_only']:,} right only in the first and {row['second_only']:,} "
                f"only in the second; {row['visible']:.4f} is the smallest difference that they show in 4 of 5"
            )
        found += [f"    {line}" for item in row["differing"][:3] for line in side_by_side(item)]
    return found


def side_by_side(item: Mapping[str, Any]) -> list[str]:
    """An item on which two models differ."""
    asked = [*item["asked"].splitlines(), ""][0]
    told = [
        f"{one['answer'][:60]!r} ({'right' if one['right'] else 'wrong'})" for one in (item["first"], item["second"])
    ]
    return [f"item {item['number']}: {asked[:90]}", f"    {' | '.join(told)}"]
