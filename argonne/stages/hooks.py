"""What a run gives the loop beside data and loss, and writes about itself: held-out loss, samples, files of a
checkpoint, export, banner.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from argonne.config import Recipe
from argonne.files import atomic_directory, write_json, write_text
from argonne.layout import CHAT_TEMPLATE, FINAL_MODEL, MODEL_CONFIG, last_checkpoint
from argonne.model.build import config_from_fields
from argonne.model.load import load_model
from argonne.model.save import save_model_folder
from argonne.parallel.mesh import Mesh
from argonne.parallel.objective import Objective
from argonne.parallel.parallelise import Parallelised
from argonne.recipe import to_toml, to_tree
from argonne.serve.engine import stream_text
from argonne.serve.options import SamplingOptions
from argonne.stages.start import Start, architecture_fields
from argonne.tokens.tokenizer import TextTokenizer
from argonne.train.aside import Sampled, Work
from argonne.train.data import Data
from argonne.train.run import RunFolder
from argonne.train.saving import Progress


@dataclass(frozen=True)
class Shown:
    """What a stage's telemetry shows: work that yields between forward passes (None = nothing), and a warning about the
    record of a step.
    """

    held_out: Callable[[Parallelised], Work[dict[str, Any]]] | None = None
    sample: Callable[[nn.Module], Work[Sampled]] | None = None
    judge: Callable[[int, dict[str, Any]], str | None] = lambda step, record: None


def show_text(recipe: Recipe, data: Data, micro_rows: int, objective: Objective | None = None) -> Shown:
    """Held-out loss with bits per byte, by another objective where one tells more than the trained one, and the
    continuation of `checkpoint.sample_prompt`.
    """

    def held_out(model: Parallelised) -> Work[dict[str, Any]]:
        return held_out_loss(model, recipe, data, micro_rows, objective)

    return Shown(
        held_out=held_out if recipe.eval.windows else None,
        sample=(lambda model: sample_text(model, recipe, data.tokenizer)) if recipe.checkpoint.sample_prompt else None,
    )


def held_out_loss(
    model: Parallelised, recipe: Recipe, data: Data, micro_rows: int, objective: Objective | None = None
) -> Work[dict[str, Any]]:
    """Mean loss on the first held-out windows (the same ones each time), bits per byte where tokens are counted; {}
    where nothing is held out.
    """
    total, count, size = 0.0, 0, 0
    by_source: dict[int, list[float]] = {}
    sums: dict[str, list[float]] = {}
    for batch in data.held_out(recipe.eval.windows, micro_rows):
        loss = model.evaluate(batch, objective)
        yield
        total += float(loss.total - loss.penalty)
        count += int(batch[data.unit].sum())
        if data.unit == "tokens":
            labels = batch["shift_labels"]
            size += int(data.tokenizer.token_bytes[labels[labels >= 0].numpy()].sum())
        for name, pair in loss.metrics.items():
            sums[name] = [held + float(part) for held, part in zip(sums.get(name, [0.0, 0.0]), pair, strict=True)]
        if loss.rows is not None:
            for row, source, counted in zip(
                loss.rows.tolist(), batch["source"].tolist(), batch[data.unit].tolist(), strict=True
            ):
                part = by_source.setdefault(source, [0.0, 0])
                part[0] += row
                part[1] += counted
    if not count:
        return {}
    found: dict[str, Any] = {"loss": total / count, data.unit: count}
    if data.unit == "tokens":
        found |= {"bits_per_byte": total / math.log(2) / size if size else None, "bytes": size}
    if sums:
        found["metrics"] = {name: value / number if number else None for name, (value, number) in sums.items()}
    if len(by_source) > 1:
        means = {
            source: {"loss": loss / max(1, counted), data.unit: counted}
            for source, (loss, counted) in by_source.items()
        }
        found["sources"] = {data.source_names[source]: mean for source, mean in means.items()}
    return found


def sample_text(model: nn.Module, recipe: Recipe, tokenizer: TextTokenizer) -> Work[Sampled]:
    """What the model writes after the prompt, in nucleus sampling from the recipe's seed."""
    prompt, tokens = recipe.checkpoint.sample_prompt, recipe.checkpoint.sample_tokens
    options = SamplingOptions(tokens, temperature=0.8, top_k=0, top_p=0.95, seed=recipe.seed)
    pieces = []
    for piece in stream_text(model, tokenizer, prompt, options):
        pieces.append(piece)
        yield
    text = "".join(pieces)
    return Sampled("sample", {"prompt": prompt, "text": text}, f"**{prompt}**{text}", f"sample: {prompt}{text}")


def of_newest(
    run: Path, start: Callable[[], nn.Module], hook: Callable[[nn.Module], Work[Sampled]], model: nn.Module
) -> Work[Sampled]:
    """The sample of a model that no rank holds whole: of the newest checkpoint, before it of the start, on the CPU."""
    found = last_checkpoint(run)
    whole: nn.Module = load_model(found).model if found else start()
    return (yield from hook(whole.eval()))


def export_final(model: Parallelised, run: Path, data: Data) -> None:
    """Write the complete Hugging Face folder, atomically; an older one is replaced. Where no rank holds the whole model
    it is read from disk.
    """
    whole = model.plain if model.forward == "alone" else load_model(last_checkpoint(run) or run).model
    with atomic_directory(run / FINAL_MODEL, replace=True) as temporary:
        ids = save_tokenizer(data, temporary)
        save_model_folder(whole, temporary, **ids)


def save_tokenizer(data: Data, folder: Path) -> dict[str, Any]:
    """Write the data's tokenizer, with the chat template where it has one; the ids that a model's config names. A chat
    model stops at its turn end.
    """
    data.tokenizer.save(folder)
    if data.chat is not None:
        write_text(folder / CHAT_TEMPLATE, data.chat.jinja)
    stops = data.tokenizer.eos_id if data.chat is None else list(data.chat.stop_ids)
    return {"eos_id": stops, "bos_id": data.tokenizer.bos_id, "pad_id": data.tokenizer.pad_id}


def checkpoint_files(folder: Path, recipe: Recipe, data: Data) -> None:
    """config.json, recipe.toml and the tokenizer: a checkpoint alone is enough to generate, to resume and to import."""
    config = config_from_fields(architecture_fields(recipe.model))
    for name, value in save_tokenizer(data, folder / "tokenizer").items():
        setattr(config, name.replace("_id", "_token_id"), value)
    write_json(folder / MODEL_CONFIG, config.to_dict())
    write_text(folder / "recipe.toml", to_toml(recipe))


def banner(model: Any, run: RunFolder, recipe: Recipe, mesh: Mesh) -> list[str]:
    """What really ran in the first step, read from the live model."""
    here = [index for index, layer in enumerate(model.model.layers) if any(True for _ in layer.parameters())]
    taken: dict[int, str] = {}
    parts = mesh.gather(dict(zip(here, model.attention_paths(), strict=True)))
    for part in parts:
        taken |= part
    paths = [taken[index] for index in sorted(taken)]
    precision = recipe.train.precision
    dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()})
    if mesh.is_main:
        run.update_manifest(attention_paths=paths, precision=precision, parameter_dtypes=dtypes)
    groups = [
        f"{path} on layers {_ranges([layer for layer, found in enumerate(paths) if found == path])}"
        for path in dict.fromkeys(paths)
    ]
    told = [f"attention: {'; '.join(groups)}", f"precision: {precision}, weights in {', '.join(dtypes)}"]
    if mesh.pipeline > 1:
        stages = [_ranges(sorted(part)) for part in parts[:: mesh.world_size // mesh.pipeline]]
        told.append(f"pipeline: layers {' | '.join(stages)}")
    return told


def _ranges(numbers: list[int]) -> str:
    """[0, 2, 4, 5, 6] -> 0, 2, 4-6."""
    runs = [
        [number for _, number in run]
        for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    ]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def run_state(
    step: int, recipe: Recipe, data: Data, run: RunFolder, progress: Progress, mesh: Mesh, start: Start
) -> dict[str, Any]:
    """state.json: counts and identities, never buffers."""
    return {
        "run_id": run.run_id,
        "tokens": data.tokens_before(step),
        "tokens_before": start.tokens_before,
        "samples": data.samples_before(step),
        "progress": dataclasses.asdict(progress),
        "recipe": to_tree(recipe),
        "data": data.state(step),
        "tokenizer_fingerprint": data.tokenizer.fingerprint,
        "world_size": mesh.world_size,
        "parent": start.parent,
    }
