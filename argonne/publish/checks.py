"""What must hold of a staged folder before it is published, read off its files. Each check names what it found and what
to do; `behaviour` asks the folder itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from argonne import layout
from argonne.data.chat import ChatTemplate
from argonne.errors import first_line
from argonne.files import verify_directory
from argonne.model import save
from argonne.model.configuration_argonne import SLIDING
from argonne.model.load import LoadedModel, stop_ids
from argonne.model.stored import is_finite
from argonne.publish.card import counts_in, front_matter
from argonne.publish.native import native_twin
from argonne.publish.source import Trained
from argonne.tokens.tokenizer import TextTokenizer

INDEX = "model.safetensors.index.json"
AGAIN = "export the model again"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")
MAGIC = (b"PK\x03\x04", *(b"\x80" + bytes([protocol]) for protocol in range(2, 6)))  # a zip, pickles
BELONGS = re.compile(
    r"model[\w.-]*\.safetensors|model\.safetensors\.index\.json|(generation_)?config\.json|argonne_export\.json|"
    r"sha256\.json|README\.md|LICENSE[\w.-]*|NOTICE[\w.-]*|\.gitattributes|model\.sig|\.eval_results/[\w.-]+\.yaml|"
    r"images/[\w.-]+\.(png|svg)|[a-z_]+\.py"
)
TEXT = (".json", ".md", ".jinja", ".py", ".yaml", ".txt", ".sig", "")
WORDS = (layout.TOKENIZER_FILE, layout.VOCABULARY, layout.MERGES)  # a vocabulary may hold any word
SECRETS = {
    "a token of the Hub": r"\bhf_[A-Za-z0-9]{20,}",
    "a key of OpenAI or Anthropic": r"\bsk-[A-Za-z0-9_-]{20,}",
    "a key of AWS": r"\bAKIA[0-9A-Z]{16}\b",
    "a token of GitHub": r"\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
PATHS = re.compile(
    r"(?<![\w./:<-])/(?:home|root|Users|mnt|scratch|data|tmp|work|opt|var|lustre|gpfs|projects?|nfs|private)/[^\s\"'`)<>]+"
    r"|\b[A-Za-z]:\\{1,2}[A-Za-z][^\s\"'`)<>]+"
)


class Problem(NamedTuple):
    """Which check failed, what it found, and what to do."""

    check: str
    found: str
    instead: str


@dataclass(frozen=True)
class Staged:
    """A folder to be published, and the model that it must be. past: its trainings, None where they are not all on this
    disk. template: how it is asked in turns; a base model has none.
    """

    folder: Path
    kind: str
    repository: str
    source: LoadedModel
    tokenizer: TextTokenizer | None
    template: ChatTemplate | None
    past: list[Trained] | None
    damaged: Sequence[str] = ()  # what its export's own hashes say

    def json(self, name: str) -> dict[str, Any]:
        """What a file holds; nothing where it is missing or damaged, which another check tells."""
        try:
            read = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return read if isinstance(read, dict) else {}

    def ends(self) -> set[int]:
        """Ids that end an answer: the end of text, and of a turn where the model was taught turns."""
        found = {self.tokenizer.eos_id} if self.tokenizer is not None else set()
        found |= {self.template.turn_end_id} if self.template is not None else set()
        return {int(end) for end in found if end is not None}


Found = Iterator[tuple[str, str]]


def files(staged: Staged) -> Found:
    """All files are those of a model, whole, and none of them runs when it is read."""
    for line in (*staged.damaged, *verify_directory(staged.folder)):
        yield line.replace(f"{staged.folder}/", ""), AGAIN
    for path in sorted(staged.folder.rglob("*")):
        name = path.relative_to(staged.folder).as_posix()
        if path.is_symlink():
            yield f"{name} is a link", "put the file itself there"
        elif path.is_file():
            with open(path, "rb") as file:
                begins = file.read(4)
            if path.suffix in PICKLES or begins.startswith(MAGIC):
                yield f"{name} is a pickle or an archive: reading it runs code", "remove it; weights are safetensors"
            elif not (BELONGS.fullmatch(name) or name in layout.TOKENIZER_FILES):
                yield f"{name} is no part of a model", "remove it"
    for name in (layout.MODEL_CONFIG, layout.GENERATION_CONFIG):
        if not staged.json(name):
            yield f"{name} is missing or no JSON object", AGAIN


def auto_classes(staged: Staged) -> Found:
    """transformers finds every class, and the code is this version's."""
    config = staged.json(layout.MODEL_CONFIG)
    shipped = {path.name for path in staged.folder.glob("*.py")}
    if staged.kind == "native":
        if shipped or "auto_map" in config:
            yield "a stock class needs no code of its own, and auto_map or *.py is there", AGAIN
        return
    names = save.auto_map(type(staged.source.model.config))
    for auto, name in names.items():
        if config.get("auto_map", {}).get(auto) != name:
            yield f"auto_map names {config.get('auto_map', {}).get(auto)!r} as {auto}, expected {name!r}", AGAIN
    own = Path(save.__file__).parent
    expected = save.shipped_code(type(staged.source.model))
    for name in sorted(expected | shipped):
        if name not in shipped:
            yield f"{name} is missing: the class needs it", AGAIN
        elif name not in expected:
            yield f"{name} is no part of the class", "remove it"
        elif (own / name).read_bytes() != (staged.folder / name).read_bytes():
            yield f"{name} is not this argonne's: code of earlier ones fails in newer transformers", AGAIN


def weights(staged: Staged) -> Found:
    """The index names what is there; every tensor is finite, of the dtype that the config says, and the source's."""
    stored: dict[str, Path] = {}
    for path in sorted(staged.folder.glob(layout.WEIGHTS)):
        try:
            with safe_open(path, "pt") as file:
                stored |= dict.fromkeys(file.keys(), path)
        except SafetensorError as error:
            yield f"{path.name} is truncated or damaged ({error})", AGAIN
    listed = staged.json(INDEX).get("weight_map")
    if listed is not None and listed != {name: path.name for name, path in stored.items()}:
        wrong = sorted({*listed} ^ {*stored}) or sorted(name for name in listed if listed[name] != stored[name].name)
        yield f"{INDEX} and the files differ, first in {wrong[0]}", AGAIN
    elif listed is None and len({*stored.values()}) > 1:
        yield f"{INDEX} is missing for {len({*stored.values()})} files", AGAIN
    expected, dtype = _expected_tensors(staged), staged.json(layout.MODEL_CONFIG).get("dtype")
    for name in sorted({*expected} - {*stored}):
        yield f"{name} is missing", AGAIN
    for name, path in stored.items():
        try:
            with safe_open(path, "pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except SafetensorError as error:
            yield f"{name} in {path.name} cannot be read ({error})", AGAIN
            continue
        wanted = expected.get(name)
        if tensor.is_floating_point() and str(tensor.dtype).removeprefix("torch.") != dtype:
            yield f"{name} is {str(tensor.dtype).removeprefix('torch.')}, {layout.MODEL_CONFIG} says {dtype}", AGAIN
        elif not is_finite(tensor):
            yield f"{name} holds NaN or infinity", "publish an earlier checkpoint, or export again"
        elif wanted is None:
            yield f"{name} is none of the model's", AGAIN
        elif not torch.equal(tensor, wanted):
            yield f"{name} is not the tensor of the model that was trained", AGAIN


def _expected_tensors(staged: Staged) -> dict[str, Tensor]:
    model = staged.source.model
    native = native_twin(model) if staged.kind == "native" else None
    state = dict(model.state_dict()) if native is None else native.state
    if (model if native is None else native).config.tie_word_embeddings:
        state.pop("lm_head.weight", None)  # stored once
    return {name: tensor.detach() for name, tensor in state.items()}


def configuration(staged: Staged) -> Found:
    """What the config says is what the model is and what training did."""
    written, model = staged.json(layout.MODEL_CONFIG), staged.source.model
    own = model.config if staged.kind == "hf" else native_twin(model).config
    kept = ("transformers_version", "dtype", "torch_dtype", "auto_map", "architectures", "_name_or_path")
    ids = ("eos_token_id", "bos_token_id", "pad_token_id")
    layers = written.get("layer_types") or []
    if written.get("sliding_window") is not None and SLIDING not in layers and staged.kind == "hf":
        yield f"sliding_window is {written['sliding_window']}, and no layer is {SLIDING}", AGAIN
        return
    try:
        read = as_read(written, type(own))
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        yield f"{layout.MODEL_CONFIG} is refused by its class ({first_line(error)})", AGAIN
        return
    expected = as_read(own.to_dict(), type(own))
    longest = None if staged.past is None else max(training.longest_row for training in staged.past)
    context = context_of(read)
    for name in sorted(({*read} | {*expected}) - {*kept, *ids}):
        if read.get(name) != expected.get(name):
            yield f"{name} is {read.get(name)!r}, in the model that was trained {expected.get(name)!r}", AGAIN
    if longest is not None and context is not None and context > longest:
        yield (
            f"it says a context of {context:,}, and no training read rows of more than {longest:,} tokens",
            "train it at that length (argonne midtrain)",
        )


def as_read(written: dict[str, Any], config_class: Any) -> dict[str, Any]:
    """The fields of a config as its class reads them, with those beside them that other engines read."""
    return {**written, **config_class.from_dict(dict(written)).to_dict()}


def context_of(config: dict[str, Any]) -> int | None:
    """The longest text, by whichever name a class gives it."""
    found = config.get("max_position_embeddings", config.get("n_positions"))
    return found if isinstance(found, int) else None


def end_of_text(staged: Staged) -> Found:
    """Answers end where those of training did, and batches can be padded."""
    settings, config = staged.json(layout.GENERATION_CONFIG), staged.json(layout.MODEL_CONFIG)
    trained = stop_ids(staged.source.folder, staged.source.model.config.to_dict())["eos_id"]
    expected = staged.ends() | _as_set(trained)
    for name, file in ((layout.GENERATION_CONFIG, settings), (layout.MODEL_CONFIG, config)):
        if (found := _as_set(file.get("eos_token_id"))) != expected:
            yield f"{name} ends an answer at {sorted(found)}, training at {sorted(expected)}", AGAIN
        if file.get("pad_token_id") is None:
            yield f"{name} names no pad_token_id: batches cannot be made", AGAIN


def _as_set(ids: Any) -> set[int]:
    return {*ids} if isinstance(ids, list) else {ids} - {None}


def tokenizer(staged: Staged) -> Found:
    """The tokenizer is the training's, byte for byte but for what staging sets."""
    if staged.tokenizer is None:
        yield "the model has no tokenizer", "copy the training's files beside the weights of the source"
        return
    trained = staged.tokenizer.folder
    for name in layout.TOKENIZER_FILES:
        one, other = (folder / name for folder in (trained, staged.folder))
        if one.is_file() != other.is_file():
            yield f"{name} is {'missing' if one.is_file() else 'not in the training'}", AGAIN
        elif one.is_file() and name != layout.TOKENIZER_CONFIG and one.read_bytes() != other.read_bytes():
            yield f"{name} is not the training's", AGAIN
    about = staged.json(layout.TOKENIZER_CONFIG)
    wanted = tokenizer_config(staged.source, staged.tokenizer, context_of(staged.json(layout.MODEL_CONFIG)))
    for name in sorted({*about} | {*wanted}):
        if about.get(name) != wanted.get(name):
            yield f"{layout.TOKENIZER_CONFIG}: {name} is {about.get(name)!r}, expected {wanted.get(name)!r}", AGAIN
    recorded = {training.state.get("tokenizer_fingerprint") for training in (staged.past or [])[-1:]}
    if staged.past and recorded != {staged.tokenizer.fingerprint}:
        yield "the source's tokenizer is not the one that its training recorded", "put the training's own there"
    if staged.tokenizer.vocab_size > staged.source.model.config.vocab_size:
        yield "it has ids beyond the embedding's rows: it is another model's", "put the training's own there"


def tokenizer_config(source: LoadedModel, tokenizer: TextTokenizer, context: int | None) -> dict[str, Any]:
    """tokenizer_config.json as it is published: the training's, with the context as the length at which tokenizers warn
    and cut, and a pad token.
    """
    file = tokenizer.folder / layout.TOKENIZER_CONFIG
    about: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    pad = stop_ids(source.folder, source.model.config.to_dict())["pad_id"]
    pad = tokenizer.eos_id if pad is None else pad
    about["model_max_length"] = context
    about["clean_up_tokenization_spaces"] = False
    if about.get("pad_token") is None and pad is not None:
        about["pad_token"] = tokenizer.decode([pad])
    return about


def secrets(staged: Staged) -> Found:
    """No text names a place of this machine or holds a key."""
    for path in sorted(staged.folder.rglob("*")):
        if not path.is_file() or path.suffix not in TEXT:
            continue
        name, text = path.relative_to(staged.folder).as_posix(), path.read_text(encoding="utf-8", errors="replace")
        for what, pattern in SECRETS.items():
            if found := re.search(pattern, text):
                yield f"{name} holds {what} ({found[0][:7]}...)", "remove it, and revoke the key: it was in a file"
        if path.name not in WORDS and (found := PATHS.search(text)):
            yield f"{name} names {found[0]!r}, a place of one machine", "write it as others find it"


def card(staged: Staged) -> Found:
    """The card has what the Hub reads, and its parameter counts are the model's."""
    text = (staged.folder / layout.MODEL_CARD).read_text(encoding="utf-8")
    facts = front_matter(text)
    if facts is None:
        yield f"{layout.MODEL_CARD} does not begin with the lines of YAML that the Hub reads", "begin it with ---"
    elif facts.get("library_name") != "transformers":
        yield f"library_name is {facts.get('library_name')!r}, expected 'transformers'", "write it so"
    count = staged.source.model.num_parameters()
    told = list(counts_in(text))
    if not told:
        yield "it does not say how many parameters the model has", f"write {count:,} parameters"
    for written, low, high in told:
        if not low <= count <= high:
            yield f"it says {written!r}, the model has {count:,}", f"write {count:,} parameters"


CHECKS: dict[str, Callable[[Staged], Found]] = {
    "files": files,
    "auto classes": auto_classes,
    "weights": weights,
    "configuration": configuration,
    "end of text": end_of_text,
    "tokenizer": tokenizer,
    "secrets and paths": secrets,
    "card": card,
}
