"""Small files of conversations to fine-tune on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def conversations(count: int, *, think: bool = False) -> list[dict[str, Any]]:
    """Sums, each asked twice in one conversation; with or without a trace."""
    rows = []
    for number in range(count):
        turns = []
        for other in (number % 7, number % 5):
            trace = f"<think>\n{number} and {other} make {number + other}\n</think>\n\n" if think else ""
            turns += [
                {"role": "user", "content": f"What is {number} + {other}?"},
                {"role": "assistant", "content": f"{trace}It is {number + other}."},
            ]
        rows.append({"messages": turns[: 2 if think else 4]})
    return rows


def pairs(count: int) -> list[dict[str, Any]]:
    """Sums; a short answer is better than a long one."""
    return [
        {
            "prompt": f"What is {number} + 1?",
            "chosen": f"{number + 1}",
            "rejected": f"The answer is {number + 1}, I think",
        }
        for number in range(count)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
