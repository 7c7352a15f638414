"""Items of a measurement that stand in what the model was trained on, by the rule of `prepare --decontaminate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from argonne.errors import InputError
from argonne.evaluate.choices import error_of
from argonne.evaluate.compare import is_right
from argonne.evaluate.lineage import sources_of
from argonne.evaluate.requests import Task
from argonne.prepare.grams import FEWEST_WORDS, Gram, Wanted, grams_of, words_of

NAMED = 5  # items in the lines for a person
Item = tuple[str, int]  # name of its task, number from 0 among the task's items


def contamination_of(
    model: str | Path,
    tasks: Sequence[Task],
    results: dict[str, Any],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """For each task with texts: which items stand in the training documents of the model's lineage, and the
    accuracy with and without them (None where nothing could be checked).

    An item is found by its parts one after the other, and by each of them. One that is not found and none of whose
    parts is long enough is too short: only its layout in a document could tell. `results`: of each task, with their
    items.
    progress: called with (bytes read, bytes in all).
    """
    texts = {task.name: task.texts() for task in tasks if hasattr(task, "texts")}
    owners: dict[Gram, tuple[Item, ...]] = {}
    for name, items in texts.items():
        for number, parts in enumerate(items):
            whole = [" ".join(parts), *parts]
            for gram in dict.fromkeys(gram for text in whole for gram in grams_of(words_of(text))):
                owners[gram] = (*owners.get(gram, ()), (name, number))
    places, checked, missing = _search(model, owners, progress)
    found = {}
    for name, items in texts.items():
        right = [is_right(item) for item in results[name]["items"]]
        hit = {number: where for number in range(len(items)) if (where := places.get((name, number)))}
        short = [
            number not in hit and not any(any(grams_of(words_of(part))) for part in parts)
            for number, parts in enumerate(items)
        ]
        found[name] = {
            "checked": checked,
            "not_checked": missing,
            "items": list(hit),
            "found_in": list(hit.values()),
            "too_short": sum(short),
            "with": _counted(right),
            "without": _counted([one for number, one in enumerate(right) if number not in hit]) if checked else None,
        }
    return found


def _search(
    model: str | Path,
    owners: dict[Gram, tuple[Item, ...]],
    progress: Callable[[int, int], None] | None,
) -> tuple[dict[Item, list[str]], list[dict[str, Any]], list[dict[str, Any]]]:
    """(sources of each item that is found, sources that were read to their end, the others and why)."""
    places, checked, missing = dict[Item, list[str]](), list[dict[str, Any]](), list[dict[str, Any]]()
    wanted = Wanted(owners)
    sources, read = sources_of(model), 0
    total = sum(source.size for source in sources)
    for source in sources:
        hits, count, why = set[Item](), 0, source.why
        try:
            for document, size in source.documents():
                for text in document:
                    hits.update(item for gram in wanted.found_in(text) for item in owners[gram])
                count, read = count + 1, read + size
                if progress is not None:
                    progress(read, total)
        except InputError as error:
            why = str(error)
        for item in hits:
            places.setdefault(item, []).append(source.name)
        if why:
            missing.append({"source": source.name, "why": why})
        else:
            checked.append({"source": source.name, "documents": count})
    return places, checked, missing


def _counted(right: Sequence[bool]) -> dict[str, Any]:
    accuracy = float(np.mean(right)) if right else None
    return {"accuracy": accuracy, "standard_error": error_of(right) if right else None, "questions": len(right)}


def lines(found: dict[str, Any]) -> list[str]:
    """What was found for one task, for a person."""

    def score(part: dict[str, Any]) -> str:
        if part["accuracy"] is None:
            return "no item is left"
        error = "" if part["standard_error"] is None else f" ± {part['standard_error']:.4f}"
        return f"{part['accuracy']:.4f}{error} ({part['questions']:,})"

    told = [f"not checked: {one['source']}: {one['why']}" for one in found["not_checked"]]
    if found["checked"]:
        pairs = list(zip(found["items"], found["found_in"], strict=True))
        named = [f"{number} ({', '.join(where)})" for number, where in pairs[:NAMED]]
        more = f" and {len(pairs) - NAMED:,} more" if len(pairs) > NAMED else ""
        first = f"{len(pairs):,} of {found['with']['questions']:,} items found{': ' if pairs else ''}{', '.join(named)}"
        told = [
            *(f"checked: {one['source']}, {one['documents']:,} documents" for one in found["checked"]),
            *told,
            f"{found['too_short']:,} items not found are too short to check (no part of {FEWEST_WORDS} words)",
            f"with them {score(found['with'])}, without {score(found['without'])}",
        ]
        return [f"    contamination: {first}{more}", *(f"        {line}" for line in told)]
    return ["    contamination: not checked", *(f"        {line}" for line in told)]
