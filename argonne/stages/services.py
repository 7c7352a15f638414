"""What a stage gives the loop beside data and loss: held-out loss, samples, the files of a checkpoint, the final export."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from argonne.config import Recipe
from argonne.files import atomic_directory, write_json, write_text
from argonne.model.build import config_from_fields
from argonne.model.save import save_model_folder
from argonne.parallel.mesh import Mesh
from argonne.plan import device_peak_flops, flops_per_token
from argonne.recipe import to_toml
from argonne.serve.engine import sample_text
from argonne.stages.stage import Data
from argonne.stages.start import architecture_fields
from argonne.tokens.tokenizer import load_tokenizer
from argonne.train.precision import resolve_precision
from argonne.train.run import RunFolder
from argonne.train.trainer import Services


def make_services(recipe: Recipe, data: Data, run: RunFolder, mesh: Mesh, micro_rows: int) -> Services:

    tokenizer = load_tokenizer(data.tokenizer_folder)
    return Services(
        export=lambda model, folder: export_final(model, folder, tokenizer),
        checkpoint_files=lambda folder: _checkpoint_files(folder, recipe, tokenizer),
        held_out=held_out_loss(recipe, data, mesh, micro_rows, tokenizer.token_bytes),
        sample=_sampler(recipe, tokenizer),
        banner=lambda model: _banner(model, run, recipe, mesh),
    )


def export_final(model: nn.Module, folder: Path, tokenizer: Any) -> None:
    """Write the complete Hugging Face folder, atomically; an older one is replaced."""

    with atomic_directory(folder, replace=True) as temporary:
        tokenizer.save(temporary)
        save_model_folder(model, temporary, eos_id=tokenizer.eos_id, bos_id=tokenizer.bos_id, pad_id=tokenizer.pad_id)


def _checkpoint_files(folder: Path, recipe: Recipe, tokenizer: Any) -> None:
    """config.json, recipe.toml and the tokenizer: a checkpoint alone is enough to generate, to resume and to import."""

    write_json(folder / "config.json", config_from_fields(architecture_fields(recipe.model)).to_dict())
    write_text(folder / "recipe.toml", to_toml(recipe))
    tokenizer.save(folder / "tokenizer")


def held_out_loss(
    recipe: Recipe, data: Data, mesh: Mesh, micro_rows: int, token_bytes: Any
) -> Callable[[nn.Module], dict[str, Any]] | None:
    """A function of the model: mean loss on the first held-out windows (the same ones each time), None where nothing is held out."""
    windows = min(recipe.eval.windows, data.held_out_windows)
    if windows < 1:
        return None

    names = data.held_out_sources(windows)
    several = len(set(names)) > 1

    def measure(model: nn.Module) -> dict[str, Any]:
        total, tokens, size = 0.0, 0, 0
        by_source = {name: [0.0, 0] for name in names} if several else {}
        row_names = iter(names)
        for batch in data.held_out_batches(windows, micro_rows):
            labels = batch["shift_labels"]
            trained = labels[labels != -100]
            inputs = {name: tensor.to(mesh.device) for name, tensor in batch.items()}
            output = model(**inputs, use_cache=False, loss_reduction="sum", return_token_log_probs=several)
            total += float(output.loss)
            tokens += len(trained)
            size += int(token_bytes[trained.numpy()].sum())
            if several:
                for row, valid in zip(output.token_log_probs.sum(dim=1).tolist(), (labels != -100).sum(dim=1).tolist(), strict=True):
                    part = by_source[next(row_names)]
                    part[0] -= row
                    part[1] += valid
        bits = total / math.log(2) / size if size else None
        found = {"loss": total / max(1, tokens), "bits_per_byte": bits, "tokens": tokens, "bytes": size}
        parts = {name: {"loss": loss / max(1, valid), "tokens": valid} for name, (loss, valid) in by_source.items()}
        return {**found, "sources": parts} if several else found

    return measure


def _sampler(recipe: Recipe, tokenizer: Any) -> Callable[[nn.Module], str]:
    def sample(model: nn.Module) -> str:

        keep = recipe.checkpoint
        return sample_text(model, tokenizer, keep.sample_prompt, max_new_tokens=keep.sample_tokens, seed=recipe.seed)

    return sample


def _banner(model: nn.Module, run: RunFolder, recipe: Recipe, mesh: Mesh) -> list[str]:
    """What really ran in the first step, read from the live model."""

    plain: Any = getattr(model, "module", model)
    paths = plain.attention_paths()
    precision = resolve_precision(recipe.train.precision, mesh.device)
    dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in plain.parameters()})
    if mesh.is_main:
        run.update_manifest(attention_paths=paths, precision=precision, parameter_dtypes=dtypes)
    groups = [f"{path} on layers {_ranges([layer for layer, found in enumerate(paths) if found == path])}" for path in dict.fromkeys(paths)]
    return [f"attention: {'; '.join(groups)}", f"precision: {precision}, weights in {', '.join(dtypes)}"]


def _ranges(numbers: list[int]) -> str:
    """[0, 2, 4, 5, 6] -> 0, 2, 4-6."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def speed_of(recipe: Recipe, mesh: Mesh) -> tuple[float | None, float | None]:
    """(FLOPs a token, peak FLOP/s of one device); None where the device's peak is not known."""

    name = torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else "cpu"
    peak = device_peak_flops(name, resolve_precision(recipe.train.precision, mesh.device))
    return flops_per_token(recipe.model, recipe.data.sequence_length), peak
