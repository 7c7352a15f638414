"""Where the records of a run go beside metrics.jsonl: TensorBoard, W&B and trackio."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from argonne import layout
from argonne.config import LogSection


@dataclass(frozen=True)
class Writer:
    """Another place for the records. write(event, step, values)."""

    write: Callable[[str, int, dict[str, Any]], Any]
    close: Callable[[], Any]


def makers_of(
    log: LogSection, folder: Path, step: int, run_id: str, recipe: dict[str, Any]
) -> dict[str, Callable[[], Writer]]:
    """What makes each of those that the recipe asks for, for a session that begins at `step`."""
    name, makers = folder.resolve().name, dict[str, Callable[[], Writer]]()
    if log.tensorboard:
        makers["tensorboard"] = partial(_tensorboard, folder / layout.TENSORBOARD, step)
    if log.wandb:
        makers["wandb"] = partial(_wandb, log.wandb, name, run_id, recipe, folder)
    if log.trackio:
        makers["trackio"] = partial(_trackio, log.trackio, f"{name}-{run_id}", recipe)
    return makers


def _scalars(event: str, values: dict[str, Any]) -> dict[str, float]:
    found = {
        f"{event}/{name}": value
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    found |= {f"{event}/{name}": value for name, value in (values.get("metrics") or {}).items() if value is not None}
    for source, numbers in (values.get("sources") or {}).items():
        found |= {f"{event}/{source}/{name}": value for name, value in numbers.items() if value is not None}
    return found


def _tensorboard(folder: Path, step: int) -> Writer:
    """What an earlier session wrote beyond `step` is void."""
    from torch.utils.tensorboard.writer import SummaryWriter

    writer = SummaryWriter(str(folder), purge_step=step + 1)

    def write(event: str, step: int, values: dict[str, Any]) -> None:
        for name, value in _scalars(event, values).items():
            writer.add_scalar(name, value, step)
        if event == "sample":
            writer.add_text("sample", f"{values.get('prompt', '')}{values.get('text', '')}", step)
        writer.flush()

    return Writer(write, writer.close)


def _wandb(project: str | None, name: str, run_id: str, recipe: dict[str, Any], folder: Path) -> Writer:
    import wandb

    run = wandb.init(project=project, name=name, id=run_id, resume="allow", config=recipe, dir=str(folder))
    # Not as W&B's own step, which may not go back, as a resume after a kill does.
    return Writer(lambda event, step, values: run.log({**_scalars(event, values), "step": step}), lambda: run.finish())


def _trackio(project: str | None, name: str, recipe: dict[str, Any]) -> Writer:
    import trackio

    run = trackio.init(project=project, name=name, resume="allow", config=recipe)  # a run is known by its name
    return Writer(lambda event, step, values: run.log(_scalars(event, values), step=step), lambda: run.finish())
