"""The tables of docs/parallelism.md: what the plan says of the generations' recipes on several machines. Arithmetic
alone, the same on any machine.

python -m benchmarks.meshes [--write]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from argonne.plan import Plan, make_plan
from argonne.plan.mesh import LINK_USE, LINKS
from argonne.recipe import load_recipe
from benchmarks.harness import write_table

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "parallelism.md"
RECIPES = tuple(f"argonne-{generation}-pretrain" for generation in ("1.0", "1.5", "2.0", "2.5", "3.0"))
MACHINES = (("h200", 1), ("h200", 3), ("a100-80gb", 8), ("h100", 8))
CARDS = ("rtx-4090", "a100-40gb", "a100-80gb", "h100", "h200", "b200")
COUNTS = (1, 2, 3, 4, 8, 16)


def plan_on(recipe: str, gpu: str, gpus: int, **given: str) -> Plan:
    keys = {f"parallel.{name}": value for name, value in given.items()}
    return make_plan(load_recipe(recipe, keys), gpu=gpu, gpus=gpus, name=recipe)


def markdown() -> dict[str, str]:
    """Each table by the name of its markers in the document."""
    tables = {"plans": plans, "shards": shards, "fits": fits, "links": links}
    return {name: "\n".join(table()) for name, table in tables.items()}


def plans() -> Iterator[str]:
    """A row a recipe and machine, with the degrees that the plan recommends."""
    for recipe in RECIPES:
        for gpu, gpus in MACHINES:
            head, row = described(plan_on(recipe, gpu, gpus))
            if (recipe, gpu, gpus) == (RECIPES[0], *MACHINES[0]):
                yield from headed(f"| recipe | on | {head}")
            yield f"| `{recipe}` | {gpus} x {gpu} | {row}"


def shards() -> Iterator[str]:
    """One recipe and machine, a row a shard degree."""
    recipe, gpu, gpus = RECIPES[-1], "a100-80gb", 8
    for shard in ("1", "2", "4", "8"):
        head, row = described(plan_on(recipe, gpu, gpus, shard=shard))
        if shard == "1":
            yield from headed(f"| {head}")
        yield f"| {row}"


def headed(head: str) -> Iterator[str]:
    yield head
    yield "|" + " --- |" * (head.count("|") - 1)


def described(plan: Plan) -> tuple[str, str]:
    """The head's cells, and those of a plan."""
    sent = dict.fromkeys(("all-gather", "reduce-scatter", "all-reduce"), 0.0)
    for part in plan.traffic:
        sent[part["kind"]] += part["bytes"]
    step = plan.tokens_per_step / (plan.tokens_per_second or float("nan"))
    cells = {
        "replicate x shard": f"{plan.layout['replicate']} x {plan.layout['shard']}",
        "rows x micro-batches": f"{plan.micro_rows} x {plan.micro_batches}",
        "recomputed": plan.activation_checkpointing,
        "memory": f"{plan.memory_total / 1e9:.1f} of {(plan.memory_limit or 0) / 1e9:.1f} GB",
        **{kind: f"{size / 1e9:.1f} GB" if size else "-" for kind, size in sent.items()},
        "sending, of a step": f"{plan.traffic_seconds:.3f} of {step:.2f} s" if plan.traffic else "-",
        "tokens/s": f"{plan.tokens_per_second or 0:,.0f}",
        "days": f"{(plan.hours or 0) / 24:.1f}",
    }
    if not plan.fits:
        cells = {**dict.fromkeys(cells, ""), "replicate x shard": plan.advice or ""}
    return f"{' | '.join(cells)} |", f"{' | '.join(cells.values())} |"


def fits() -> Iterator[str]:
    """A row a recipe: of each card the smallest number that holds it."""
    yield from headed(f"| recipe | {' | '.join(CARDS)} |")
    for recipe in RECIPES:
        yield f"| `{recipe}` | {' | '.join(smallest(recipe, card) for card in CARDS)} |"


def smallest(recipe: str, card: str) -> str:
    for count in COUNTS:
        plan = plan_on(recipe, card, count)
        if plan.fits:
            return f"{count}, `--parallel.shard {plan.layout['shard']}`" if plan.layout["shard"] > 1 else f"{count}"
    return f"more than {COUNTS[-1]}"


def links() -> Iterator[str]:
    """A row a link: the cards that have it, and what the plan takes of it."""
    yield from headed("| cards | within a node | between nodes | taken |")
    for link in dict.fromkeys(LINKS.values()):
        cards = ", ".join(f"`{card}`" for card, its in LINKS.items() if its == link)
        near, far = link
        yield f"| {cards} | {near:g} GB/s | {far:g} GB/s | {LINK_USE * near:g} and {LINK_USE * far:.3g} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/parallelism.md")
    write = parser.parse_args().write
    for name, table in markdown().items():
        print(table)
        if write:
            write_table(DOCUMENT, name, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
