"""The chain behind an artifact, walked back as far as it lies on this disk: export, weights, run, tokens, tokenizer,
the models before, and the evaluations that are said to be of it.

Each link is checked by what the one before it recorded. Nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from argonne import layout
from argonne.config import CHAT_STAGES
from argonne.data.origin import Origin, holds, lies_here, origin_of, path_of_source, rendered_folder, run_of
from argonne.data.rendered import RENDERED
from argonne.errors import InputError
from argonne.files import HASH_LIST, QUICK_LIST, read_json
from argonne.layout import Kind
from argonne.report.checks import Checks, differing_tensors
from argonne.report.links import Link, Recorded, shown

AWAY = "it is not on this disk"
MODELS = (Kind.RUN, Kind.CHECKPOINT, Kind.MODEL_FOLDER, Kind.GGUF_EXPORT, Kind.ONNX_EXPORT)


def chain_of(path: Path, results: Sequence[Path], checks: Checks) -> list[Link]:
    """The links behind a model or a token set, it first; then those of `results`, folders of `argonne eval --out`.

    Raises InputError for a folder without results, and for results of what is no model.
    """
    walk = _Walk(checks)
    if layout.kind_of(path) is Kind.TOKEN_SET:
        walk.token_set(str(path), None, "")
    elif layout.kind_of(path) in MODELS:
        walk.model(path, Recorded())
    elif results:
        raise InputError(f"--results: {path} is {layout.kind_of(path).value}; results are of a model")
    for folder in results:
        walk.evaluation(path, folder)
    return walk.links


class _Walk:
    """links: found so far."""

    def __init__(self, checks: Checks) -> None:
        self.links: list[Link] = []
        self._checks = checks
        self._seen: set[tuple[Path, int | None]] = set()
        # Fingerprints of the weights that results may be of, and of the models before, with whose they are.
        self._own: dict[str, Path] = {}
        self._recorded: dict[str, str] = {}
        self._before: dict[str, Path] = {}

    def _add(self, what: str, name: str | Path) -> Link:
        self.links.append(Link(what, str(name)))
        return self.links[-1]

    def model(self, path: Path, recorded: Recorded) -> Path | None:
        """The link of a model's weights and, after it, those of what it was made of. The folder of the weights; None
        where they are not those that were recorded, damaged, or not here.
        """
        path = layout.followed(path.expanduser())
        if recorded.weights is not None and recorded.own:
            self._recorded.setdefault(recorded.weights, f"{path}, as {recorded.by} says")
        if not path.exists():
            self._add("model", path).not_checked.append(f"{AWAY} (looked for from {Path.cwd()})")
            return None
        if (key := (path.resolve(), recorded.step)) in self._seen:
            return None
        self._seen.add(key)
        if layout.kind_of(path) not in MODELS:
            why = f"it is {layout.kind_of(path).value}, which does not tell where it comes from"
            self._add("model", path).not_checked.append(why)
            return None
        folder = self._folder_of(path, recorded)
        if folder is None:
            self._add("run", path).not_checked.append("it has no checkpoint yet")
            return None
        link = self._add(_kind_in_words(folder), folder)
        self._whole(link, folder)
        weights = self._checks.weights(folder)
        if weights is not None:
            (self._own if recorded.own else self._before).setdefault(weights, folder)
        run = run_of(folder)
        last = layout.last_checkpoint(run) if run is not None else None
        went_on = last is not None and layout.step_in_name(last) != recorded.step
        if went_on and not recorded.own and recorded.weights not in (None, weights):
            link.not_checked.append(
                f"its weights against those that {recorded.by} began with, gone since its run went on"
            )
        else:
            link.compare("the fingerprint of its weights", weights, recorded.weights, recorded.by)
        if recorded.by and recorded.weights is None:
            link.not_checked.append(f"its weights against those that {recorded.by} began with, which it did not record")
        if recorded.tokenizer is not None:
            found = self._tokenizer(link, folder)
            link.compare("the fingerprint of its tokenizer", found, recorded.tokenizer, recorded.by)
        self._origin(link, folder, recorded)
        return folder if recorded.weights in (None, weights) and not link.problems else None

    def _folder_of(self, path: Path, recorded: Recorded) -> Path | None:
        """Where the weights lie that were recorded: a run may have gone on since. None of a run without weights."""
        now, last = layout.model_of_run(path), layout.last_checkpoint(path)
        if layout.kind_of(path) is not Kind.RUN or now is None:
            return None if layout.kind_of(path) is Kind.RUN else path
        found = [path / now.name, *([path / last.name] if last else [])]
        exact = path / layout.checkpoint_name(recorded.step or 0)
        if exact.is_dir():
            went_on = last is None or layout.step_in_name(last) != recorded.step
            found.insert(0 if went_on else len(found), exact)
        return next((one for one in found if recorded.weights in (None, self._checks.weights(one))), found[0])

    def _whole(self, link: Link, folder: Path) -> None:
        """Are the files of a folder those that were written?"""
        hashed_by = self._checks.hashed_by(folder)
        if hashed_by is None:
            link.not_checked.append("its files, of which no list of hashes lies there")
            return
        link.problems += self._checks.problems(folder)
        if not link.problems:
            link.verified.append(f"its files by {hashed_by}")

    def _tells(self, folder: Path, name: str) -> bool:
        """May what a file of a folder says be believed? A list of hashes that is gone or damaged tells of none."""
        damage = self._checks.damage(folder) if self._checks.hashed_by(folder) else {}
        return name not in damage and not {HASH_LIST, QUICK_LIST} & damage.keys()

    def _tokenizer(self, link: Link, folder: Path) -> str | None:
        """The fingerprint of the tokenizer of a folder; None where it has none that can be read."""
        from argonne.tokens.tokenizer import load_tokenizer

        where = layout.tokenizer_of(folder)
        if where is None:
            return None
        try:
            return load_tokenizer(where).fingerprint
        except InputError as error:
            link.problems.append(str(error))
            return None

    def _origin(self, link: Link, folder: Path, recorded: Recorded) -> None:
        run = run_of(folder)
        records = (layout.EXPORT_RECORD, layout.MERGE_RECORD)
        record = next((name for name in records if (folder / name).is_file()), None)
        if record is not None and not self._tells(folder, record):
            link.not_checked.append(f"what it was made of, since {record} is damaged")
        elif record == layout.EXPORT_RECORD:
            self._export(link, folder, recorded)
        elif record == layout.MERGE_RECORD:
            self._parents(origin_of(folder), folder)
        elif run is not None:
            self._run(link, run, folder, recorded)
        else:
            link.not_checked.append("where it comes from, which nothing in it tells")

    def _parents(self, origin: Origin, child: Path) -> None:
        for parent in origin.parents:
            told = Recorded(str(child), parent.run_id, parent.step, weights=parent.weights, own=False)
            self.model(Path(parent.model), told)

    def _export(self, link: Link, folder: Path, recorded: Recorded) -> None:
        record = read_json(folder / layout.EXPORT_RECORD)
        source = record.get("source")
        if not isinstance(source, dict):
            link.not_checked.append("what it was made of, which the records of earlier versions do not tell")
            return
        if layout.tokenizer_of(folder) is None:
            link.not_checked.append("its tokenizer, of which it has no files")
        else:
            found = self._tokenizer(link, folder)
            link.compare("the fingerprint of its tokenizer", found, source.get("tokenizer"), "its record")
        told = {name: source.get(name) for name in ("run_id", "step", "tokens", "weights", "tokenizer")}
        if source.get("model") is None:
            link.not_checked.append("its source, since its record does not say where that lies")
            return
        sound = not link.problems
        model = self.model(Path(source["model"]), Recorded(by=str(folder), **told, own=recorded.own))
        if record.get("kind") != "hf" or model is None or not sound:
            link.not_checked.append("its weights against those of its source, beyond the proof when it was made")
        else:
            _same_tensors(link, folder, model)

    def _run(self, link: Link, run: Path, folder: Path, recorded: Recorded) -> None:
        """The checkpoint beside a final model, the run, what it read, and what it began with."""
        last = layout.last_checkpoint(run)
        checkpoint = folder if folder.name != layout.FINAL_MODEL else last and run / last.name
        if checkpoint is not None and checkpoint != folder:
            self._checkpoint_of(run, checkpoint, folder, recorded.own)
        link = self._add("run", run)
        if checkpoint is not None and not self._tells(checkpoint, layout.STATE):
            link.not_checked.append(f"what it is and began with, since {checkpoint / layout.STATE} is damaged")
            return
        try:
            origin = origin_of(checkpoint or run, None, recorded.step)
        except InputError as error:
            link.not_checked.append(f"what it is and began with ({error})")
            return
        state = origin.state
        _same_run(link, run, state, recorded)
        tokenizers = {} if checkpoint is None else {str(checkpoint): self._tokenizer(link, checkpoint)}
        if folder != checkpoint:
            tokenizers[str(folder)] = self._tokenizer(link, folder)
        tokenizers |= self._sources(origin, run)
        self._one_tokenizer(run, state.get("tokenizer_fingerprint"), tokenizers)
        self._parents(origin, run)

    def _checkpoint_of(self, run: Path, checkpoint: Path, final: Path, own: bool) -> None:
        """The last checkpoint of a run that has a final model: do they hold the same weights?"""
        link = self._add("checkpoint", checkpoint)
        self._whole(link, checkpoint)
        if layout.ending_of(run) != layout.COMPLETE:
            link.not_checked.append(f"its weights against {final}, which is of an earlier end of the run")
        elif link.problems or self._checks.problems_if_sealed(final):
            link.not_checked.append(f"its weights against {final}, since one of them is damaged")
        elif _same_tensors(link, checkpoint, final) and own:
            self._own.setdefault(self._checks.weights(checkpoint) or "", checkpoint)

    def _sources(self, origin: Origin, run: Path) -> dict[str, str | None]:
        """The links of what a run read; the fingerprints of the tokenizers of token sets, by where these lie."""
        found: dict[str, str | None] = {}
        for name, fingerprint in origin.sources:
            path = path_of_source(origin, name)
            if origin.state["recipe"].get("stage") in CHAT_STAGES:
                self._conversations(origin, path or name, fingerprint)
            elif path is None:
                why = "it was read before data.sources were changed; where it lies is not recorded"
                self._add("token set", name).not_checked.append(why)
            else:
                found |= self.token_set(path, fingerprint, str(run))
        return found

    def token_set(self, path: str, fingerprint: str | None, run: str) -> dict[str, str | None]:
        """The link of a token set that a run read. The fingerprint of the tokenizer that lies with it, by its path."""
        from argonne.tokens.formats import open_tokens

        link = self._add("token set", path)
        if not lies_here(path) or layout.kind_of(path) is Kind.UNFINISHED_TOKEN_SET:
            link.not_checked.append("it is not finished" if lies_here(path) else AWAY)
            return {}
        try:
            facts, tokens = self._checks.tokens(path), open_tokens(path)
        except InputError as error:
            link.problems.append(str(error))
            return {}
        link.problems += facts["problems"]
        if tokens.format != "shards":
            link.not_checked.append("its bytes beyond a sample, since tokens of this format come without hashes")
        elif not link.problems:
            link.verified.append("its files by sha256")
        if not holds(tokens, fingerprint):
            link.problems.append(f"{path}: holds other tokens than {run} was trained on")
        elif fingerprint is not None:
            link.verified.append(f"the tokens that {run} read")
        folder = tokens.tokenizer_folder
        if folder is None:
            link.not_checked.append("its tokenizer, which does not lie with it")
            return {}
        found = self._tokenizer(link, folder)
        link.compare("the fingerprint of its tokenizer", found, tokens.tokenizer_fingerprint, "its manifest")
        return {path: found}

    def _conversations(self, origin: Origin, path: str, fingerprint: str | None) -> None:
        link = self._add("conversations", path)
        link.not_checked.append("the files themselves" if lies_here(path) else f"the files themselves: {AWAY}")
        if fingerprint is None or not ((folder := rendered_folder(origin, fingerprint)) / RENDERED).is_file():
            link.not_checked.append("how they were rendered for the training, which is not on this disk")
            return
        units = sorted(folder.glob("unit-*"))
        link.problems += [problem for unit in units for problem in self._checks.problems(unit)]
        if len(units) != (count := read_json(folder / RENDERED)["units"]):
            link.problems.append(f"{folder}: holds {len(units)} units, {count} were rendered")
        if not link.problems:
            link.verified.append("as they were rendered for the training, by sha256")

    def _one_tokenizer(self, run: Path, recorded: str | None, found: dict[str, str | None]) -> None:
        """Is the tokenizer the same wherever the run's things carry one?"""
        known = {where: fingerprint for where, fingerprint in found.items() if fingerprint is not None}
        link = self._add("tokenizer", f"of {run}")
        differing = [where for where, fingerprint in known.items() if recorded not in (None, fingerprint)]
        link.problems += [
            f"{where}: its tokenizer is {shown(known[where])}, but the run was trained with {shown(recorded)}"
            for where in differing
        ]
        same = [where for where in known if where not in differing]
        if recorded is None or not known:
            link.not_checked.append("nothing tells which it was" if recorded is None else "none lies there")
        elif same:
            link.verified.append(f"the fingerprint {shown(recorded)} in {' and '.join(same)}")

    def evaluation(self, path: Path, folder: Path) -> None:
        """The link of results that are said to be of the model at `path`. Raises InputError where there are none."""
        file = folder / layout.RESULTS
        results, link = read_json(file), self._add("evaluation", folder)
        weights, rounded = results.get("weights"), ", rounded to int8" if results.get("int8") else ""
        if weights is None:
            link.not_checked.append("of which weights it is, which the results of earlier versions do not tell")
        elif whose := self._own.get(weights) or self._recorded.get(weights) or self._alike(results, weights):
            link.verified.append(f"it is of the weights of {whose}{rounded}")
            link.not_checked.append("its numbers")
        else:
            named = self._before.get(weights) or f"{results.get('model')}, fingerprint {shown(weights)}"
            link.problems.append(f"{file}: is of other weights ({named}), not of {path}")

    def _alike(self, results: dict[str, Any], weights: str) -> str | None:
        """The folder that was measured, where it still holds those weights and they are ours under other names: a
        checkpoint and the final model that was made of it.
        """
        measured = Path(results.get("folder") or "")
        if not results.get("folder") or not measured.is_dir() or self._checks.weights(measured) != weights:
            return None
        for folder in self._own.values():
            try:
                if not differing_tensors(measured, folder):
                    return f"{measured}, tensor by tensor those of {folder}"
            except InputError:  # of a class that has other names for them
                continue
        return None


def _same_run(link: Link, run: Path, state: dict[str, Any], recorded: Recorded) -> None:
    """Is a run, as its checkpoint tells it, the one that was recorded?"""
    from argonne.model.load import tokens_before

    manifest = run / layout.MANIFEST
    if manifest.is_file():
        link.compare("id", state.get("run_id"), read_json(manifest).get("run_id"), "its manifest")
    link.compare("id", state.get("run_id"), recorded.run_id, recorded.by)
    step, before = state.get("step"), tokens_before(state)
    if step is None:
        link.not_checked.append("its step, since it keeps no checkpoint")
        return
    if not recorded.own and recorded.step not in (None, step):
        link.not_checked.append(f"its weights of step {recorded.step}, which it does not keep: it is at step {step}")
    else:
        link.compare("step", step, recorded.step, recorded.by)
    if before is not None and recorded.step == step:
        link.compare("tokens", before + state["tokens"], recorded.tokens, recorded.by)


def _same_tensors(link: Link, folder: Path, other: Path) -> bool:
    try:
        differing = differing_tensors(folder, other)
    except InputError as error:
        link.problems.append(str(error))
        return False
    if differing:
        link.problems.append(f"{folder}: {len(differing)} of its tensors are not those of {other}: {differing[0]}")
    else:
        link.verified.append(f"its weights, tensor by tensor those of {other}")
    return not differing


def _kind_in_words(folder: Path) -> str:
    if (folder / layout.EXPORT_RECORD).is_file():
        return "export"
    if (folder / layout.MERGE_RECORD).is_file():
        return "merge"
    if layout.kind_of(folder) is Kind.CHECKPOINT:
        return "checkpoint"
    return "final model" if run_of(folder) else "model"
