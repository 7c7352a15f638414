"""A folder as it will be published: an export, with its card, the curves of its training and its evaluations."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from argonne import layout
from argonne.errors import InputError
from argonne.files import read_json, verify_directory, write_json, write_text
from argonne.layout import Kind
from argonne.model.load import load_model, stop_ids
from argonne.model.stored import fingerprint_of_weights
from argonne.publish.card import LOSS_PLOT, CardFacts, eval_results, front_matter, model_card, read_results
from argonne.publish.checks import Staged, tokenizer_config
from argonne.publish.export import export_model
from argonne.publish.source import Trained, opened_source, past_of
from argonne.report.records import read_metrics, smoothed
from argonne.serve.chat import chat_template_of
from argonne.tokens.tokenizer import load_tokenizer

KINDS = ("hf", "native")


@dataclass(frozen=True)
class PublishOptions:
    """repository: ORG/NAME. source: the model that DIR was exported from, where its record does not say. results:
    folders of `argonne eval --out`. license: for the card, by the Hub's name. key: signs the folder.
    """

    repository: str
    source: str | None = None
    results: tuple[Path, ...] = ()
    license: str | None = None
    private: bool = False
    replace: bool = False
    key: Path | None = None


def stage(given: Path, folder: Path, options: PublishOptions) -> Staged:
    """Fill `folder` with what is to be published of `given`: an export, or a model that is exported first. Raises
    InputError for what cannot be published.
    """
    exported = given
    if not (given / layout.EXPORT_RECORD).is_file():
        if layout.kind_of(given) not in (Kind.RUN, Kind.CHECKPOINT, Kind.MODEL_FOLDER):
            raise InputError(f"{given}: is {layout.kind_of(given).value}; expected an export, a run or a model folder")
        exported = folder.with_name(f"{folder.name}-export")
        export_model(given, exported, kind="hf")
    record = read_json(exported / layout.EXPORT_RECORD)
    if record.get("kind") not in KINDS:
        raise InputError(
            f"{given}: is an export --as {record.get('kind')}, which is not published yet; expected --as hf or native"
        )
    if "source" not in record:
        raise InputError(f"{given}: an earlier argonne wrote it, and does not say of which model it is; export again")
    if (exported / layout.SIGNATURE).is_file() and options.key is None:
        raise InputError(
            f"{given}: is signed, and what is published is staged anew: --sign it again, or remove {layout.SIGNATURE}"
        )
    name = opened_source(record, options.source, given)
    owned = str(exported / layout.MODEL_CARD)  # may be another by now
    damaged = [line for line in verify_directory(exported) if not line.startswith(owned)]
    shutil.copytree(exported, folder, symlinks=True)
    if exported is not given:
        shutil.rmtree(exported)
    loaded, past = load_model(name), past_of(name)
    tokenizer = None if loaded.tokenizer_folder is None else load_tokenizer(loaded.tokenizer_folder)
    if tokenizer is not None:
        tokenizer.ending_as(stop_ids(loaded.folder, loaded.model.config.to_dict())["eos_id"])
    template = None if tokenizer is None else chat_template_of(tokenizer)[0]
    staged = Staged(folder, record["kind"], options.repository, loaded, tokenizer, template, past, damaged)
    public = {**record["source"], "model": None if Path(name).is_absolute() else name}
    write_json(folder / layout.EXPORT_RECORD, {**record, "source": public})
    if tokenizer is not None and (folder / layout.TOKENIZER_CONFIG).is_file():
        context = loaded.model.config.max_position_embeddings
        write_json(folder / layout.TOKENIZER_CONFIG, tokenizer_config(loaded, tokenizer, context))
    results = read_results(options.results, [record["source"]["weights"], fingerprint_of_weights(folder)])
    write_card(staged, record, results, options.license)
    return staged


def write_card(staged: Staged, record: dict[str, Any], results: Sequence[Any], license: str | None) -> None:
    """The card, the curves and the evaluations. A README.md with front matter is its owner's, and stays."""
    folder, past = staged.folder, staged.past or []
    for name, text in eval_results(results).items():
        (folder / ".eval_results").mkdir(exist_ok=True)
        write_text(folder / ".eval_results" / name, text)
    file = folder / layout.MODEL_CARD
    if file.is_file() and front_matter(file.read_text(encoding="utf-8")) is not None:
        if license is not None:
            raise InputError(f"--license: {layout.MODEL_CARD} is a card of yours; write the license there")
        return
    has_plot = draw_loss(past, folder / LOSS_PLOT)
    model, mixed = staged.source.model, staged.source.folder / layout.MERGE_RECORD
    parts = read_json(mixed)["merged"] if mixed.is_file() else []
    merged = [(part["weight"], Path(part["model"]).name) for part in parts]
    facts = CardFacts(
        staged.repository,
        model.config,
        model.num_parameters(),
        str(model.dtype).removeprefix("torch."),
        staged.kind,
        staged.template is not None,
        past,
        results,
        record["engines"],
        merged,
        license,
        has_plot,
    )
    write_text(file, model_card(facts))


def draw_loss(past: Sequence[Trained], file: Path) -> bool:
    """Loss by step of each training, beside one another; False where none has a record of it, or, as is told, nothing
    here draws.
    """
    curves = []
    for training in past:
        if not (training.run / layout.METRICS).is_file():
            continue
        metrics = read_metrics(training.run)
        steps, losses = metrics.series("step", "loss")
        if steps:
            curves.append((training.state["recipe"]["stage"], steps, losses, metrics.series("held_out", "loss")))
    if not curves:
        return False
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        print(f"warning: the card has no picture of the loss: {error}; pip install 'argonne[plots]'", file=sys.stderr)
        return False

    figure = Figure(figsize=(3.2 * max(2, len(curves)), 2.8), layout="constrained")
    for place, (title, steps, losses, (held_steps, held)) in zip(
        figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True
    ):
        place.plot(steps, losses, color="#9db8d9", linewidth=0.8)
        place.plot(steps, smoothed(losses), color="#1f5fa8", linewidth=1.5, label="training, smoothed")
        if held:
            place.plot(held_steps, held, color="#c4501b", marker="o", markersize=3, linewidth=1.2, label="held-out")
        place.set_title(title, fontsize=10)
        place.set_xlabel("step", fontsize=9)
        place.tick_params(labelsize=8)
        place.legend(fontsize=7, frameon=False)
        place.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("loss", fontsize=9)
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, dpi=150, metadata={"Software": None})
    return True
