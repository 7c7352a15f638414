"""Runs as the trainer leaves them, and what a page of them holds."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any


def step_record(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "event": "step",
        "step": step,
        "time": 1000.0 + step,
        "tokens": step * 512,
        "loss": 5.0 / step,
        "lr": 1e-3,
        "grad_norm": 1.0 / step,
        "tokens_per_second": 7000.0,
        "tokens_per_second_mean": 6500.0,
        "mfu": None,
        "memory_gb": 0.5,
        "wait_data_seconds": 0.01,
        "wait_save_seconds": 0.0,
        "sources": {
            "books": {"tokens": step * 300, "loss": 5.1 / step, "passes": step / 100},
            "web": {"tokens": step * 212, "loss": 4.9 / step, "passes": 0.0},
        },
    } | changes


def write_run(folder: Path, records: list[dict[str, Any]], *, seed: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "config.toml").write_text(f"seed = {seed}\n[optim]\nlr = 0.001  # peak learning rate\n")
    (folder / "manifest.json").write_text(
        json.dumps({"run_id": "one", "parameters": 1_052_800, "data": {"fingerprint": "abc"}})
    )
    return folder


class Page(HTMLParser):
    """What a browser would load from elsewhere, what is left open, the text, and the data of the curves."""

    void = ("meta", "br", "hr", "img", "link", "input")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.feed(html)
        self.close()
        held = next((text for text in self.scripts if text.startswith("{")), "{}")
        self.data: dict[str, Any] = json.loads(held, parse_constant=_refuse)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in self.void:
            self.open.append(tag)
        if tag in ("link", "img", "iframe"):
            self.loads.append(tag)
        self.loads += [
            f"{name}={value}"
            for name, value in attributes
            if name in ("src", "href", "xlink:href", "srcdoc") and not (value or "").startswith("#")
        ]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        inside = self.open[-1] if self.open else ""
        if inside == "script":
            self.scripts.append(data)
        elif inside != "style":
            self.text.append(data)

    def panel(self, title: str) -> dict[str, Any]:
        return next(panel for panel in self.data["panels"] if panel["title"] == title)

    def titles(self) -> list[str]:
        return [panel["title"] for panel in self.data["panels"]]

    def curve(self, name: str) -> tuple[list[int], list[float | None]]:
        """Steps and values of a curve."""
        found = [curve for panel in self.data["panels"] for curve in panel["curves"] if curve["name"] == name]
        assert found, f"no curve {name}"
        steps = self.data["steps"][found[0]["steps"]]
        assert len(steps) == len(found[0]["values"])
        return steps, found[0]["values"]


def _refuse(word: str) -> None:
    raise AssertionError(f"{word} is no JSON")
