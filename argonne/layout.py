"""Names and kinds of everything on disk, once: who writes a file takes its name from here, who is given a path asks
`kind_of`.

A kind is told by the names that lie in a folder and never by reading weights or tokens; whether the thing is whole is
for its own reader to say. Working files that one module alone writes and reads keep their names there.
"""

from __future__ import annotations

import glob
import json
import os
import re
from enum import Enum
from functools import partial
from pathlib import Path

from argonne.errors import InputError
from argonne.files import hash_list_of

# A run: runs/NAME
CONFIG = "config.toml"  # the resolved recipe
MANIFEST = "manifest.json"  # what ran; in a token set: what it holds
METRICS = "metrics.jsonl"
SAMPLES = "samples.md"
REPORT = "report.html"
TENSORBOARD = "tensorboard"
COMPUTE_PLAN = "compute_plan.json"
LEGACY_COMPUTE_PLAN = "plan.json"  # its name in runs of earlier versions
VERIFIED = "verified_data.json"
RUN_TOKENS = "data"  # the token set that `data.input` becomes
LOCK, STOPPED, COMPLETE = "run.lock", "STOPPED", "COMPLETE"
FINAL_MODEL = "final_model"
LAUNCH, LAUNCH_SCRIPT = "launch", "job.sh"  # of `argonne launch`

# A checkpoint in it: checkpoint_step_<N>
LAST = "checkpoint_last"  # leads to the newest: see `last_checkpoint`
STATE, STATE_VERSION = "state.json", 1
_CHECKPOINT = re.compile(r"checkpoint_step_(\d+)")

# A model folder, ours or another's
MODEL_CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
WEIGHTS = "*.safetensors"
GGUF_FILE = "model.gguf"  # of an export for llama.cpp
ONNX_FILE, ONNX_WEIGHTS = "model.onnx", "model.onnx.data"  # of an export for onnxruntime
EXPORT_RECORD, EXPORT_VERSION = "argonne_export.json", 1  # how an export was proven, and what other engines compute
MERGE_RECORD = "argonne_merge.json"  # of which models it is the average
MODEL_CARD = "README.md"
SIGNATURE = "model.sig"  # over every other file of a folder
RESULTS = "results.json"  # of `argonne eval --out`
LEGACY_SUFFIXES = (".pt", ".pth")
LEGACY_WEIGHTS = ("*.bin", "*.pt", "*.pth")
_LEGACY_TENSOR = re.compile(r"(?:^|\.)(?:blocks|pipeline_stages\.\d+)\.0\.")

# A tokenizer: alone, in tokenizer/ of a token set or a checkpoint, or among the files of a model folder
TOKENIZER = "tokenizer"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
VOCABULARY, MERGES = "vocab.json", "merges.txt"
CHAT_TEMPLATE = "chat_template.jinja"
CONVERSATIONS = "conversations"  # rendered ones, in a run
TOKENIZER_FILES = (
    *(TOKENIZER_FILE, TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, "added_tokens.json", VOCABULARY, MERGES),
    CHAT_TEMPLATE,
)
# What a conversation is made of, as tokens: turns, and what an answer holds beside words
TURN_TOKENS = ("<|im_start|>", "<|im_end|>")
THINK_TOKENS = ("<think>", "</think>")
CONTENT_TOKENS = (*THINK_TOKENS, "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

# A token set: manifest.json, tokenizer/ and shards; while it is made, its plan and a record of each unit
UNITS_PLAN = "plan.json"
UNITS = "units"
SOURCES = "sources.jsonl"  # what was read, a line a file, where these are too many for the manifest
TOKENS_LOCK, TOKENS_TURN = ".lock", ".turn"  # of `argonne prepare`; empty files that stay and belong to no set
TOKEN_SUFFIXES = (".bin", ".idx", ".ds", ".json")  # .ds: datatrove's; .json: a document manifest of the family
RAW_TOKENS = {"raw-uint16:": "uint16", "raw-uint32:": "uint32"}  # tokens without a header: nothing in the file tells


class Kind(Enum):
    """What a path is. The value is its name for people."""

    TOKEN_SET = "a token set"
    UNFINISHED_TOKEN_SET = "an unfinished token set"
    TOKEN_FILE = "a token file"
    TOKENIZER = "a tokenizer"
    RUN = "a run"
    CHECKPOINT = "a checkpoint"
    MODEL_FOLDER = "a model folder"
    LEGACY_FOLDER = "a model folder of earlier code"
    GGUF_EXPORT = "an export for llama.cpp"
    ONNX_EXPORT = "an export for onnxruntime"
    LEGACY_FILE = "a training checkpoint of earlier code"
    NOTHING = "nothing of ours"


def kind_of(path: Path | str) -> Kind:
    """The kind of a folder, a file, a pattern of files or a `raw-uint16:PATH`. NOTHING where nothing is there, or it is
    nothing of ours.
    """
    if str(path).startswith(tuple(RAW_TOKENS)):
        return Kind.TOKEN_FILE
    path = Path(path)
    if path.is_dir():
        return _kind_of_folder(path)
    if not (path.is_file() or is_pattern(path)):
        return Kind.NOTHING
    if path.suffix in LEGACY_SUFFIXES:
        return Kind.LEGACY_FILE
    return Kind.TOKEN_FILE if path.suffix in TOKEN_SUFFIXES else Kind.NOTHING


def _kind_of_folder(folder: Path) -> Kind:
    """More telling names first: a run and a token set share manifest.json, a checkpoint and a model
    folder config.json.
    """
    has = partial(_has, folder)
    if has(STATE) or _lost(folder, STATE):
        return Kind.CHECKPOINT
    if has(METRICS) or has(CONFIG, MANIFEST):
        return Kind.RUN
    if has(MODEL_CONFIG):
        return Kind.LEGACY_FOLDER if _has_legacy_weights(folder) else Kind.MODEL_FOLDER
    if has(EXPORT_RECORD, GGUF_FILE):
        return Kind.GGUF_EXPORT
    if has(EXPORT_RECORD, ONNX_FILE):
        return Kind.ONNX_EXPORT
    if has(CONFIG):  # a run that was ended before it had begun
        return Kind.RUN
    if has(MANIFEST):
        return Kind.TOKEN_SET
    if has(UNITS_PLAN) or has(f"{shard_name(0)}.bin"):
        return Kind.UNFINISHED_TOKEN_SET
    return Kind.TOKENIZER if tokenizer_of(folder) == folder else Kind.NOTHING


def _has(folder: Path, *names: str) -> bool:
    return all((folder / name).is_file() for name in names)


def _lost(folder: Path, name: str) -> bool:
    """Was a file that is not there when the folder was sealed? Its hash list says."""
    try:
        listed = json.loads(hash_list_of(folder).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(listed, dict) and name in (listed.get("files") or {})


def _has_legacy_weights(folder: Path) -> bool:
    """Weights in a pickle, or tensors under the names of earlier code."""
    files = sorted(folder.glob(WEIGHTS))
    if not files:
        return any(any(folder.glob(pattern)) for pattern in LEGACY_WEIGHTS)
    return any(_LEGACY_TENSOR.search(name) for file in files for name in _tensor_names(file))


def _tensor_names(file: Path) -> list[str]:
    """What the header of a safetensors file names (8 bytes of its length, then JSON); nothing where it
    cannot be read.
    """
    try:
        with open(file, "rb") as source:
            length = int.from_bytes(source.read(8), "little")
            if length > file.stat().st_size:
                return []
            return list(json.loads(source.read(length)))
    except (OSError, ValueError, TypeError):
        return []


def is_pattern(path: Path | str) -> bool:
    """Is it a glob? A file that has such a name stands for itself."""
    return any(character in str(path) for character in "*?[") and not Path(path).exists()


def matches_of(pattern: str) -> list[str]:
    """What a glob matches; as in a shell, no hidden names. The folders that it begins with stand for themselves where
    they exist: `runs[1]/*.bin`.
    """
    parts = pattern.split("/")
    known = next((count for count in range(len(parts) - 1, 0, -1) if os.path.isdir("/".join(parts[:count]) or "/")), 0)
    return glob.glob("/".join([*map(glob.escape, parts[:known]), *parts[known:]]))


def shard_name(number: int, *, held_out: bool = False) -> str:
    """The stem of a shard's files."""
    return f"{'held_out' if held_out else 'tokens'}-{number:05d}"


def index_of(shard: Path) -> Path:
    """The document ends beside a shard's tokens."""
    return shard.with_suffix(".idx")


def checkpoint_name(step: int | str) -> str:
    """The name of a step's checkpoint; of a pattern for all of them where `step` is "*"."""
    return f"checkpoint_step_{step}"


def step_in_name(path: Path) -> int | None:
    """The step in a checkpoint's name; None for another name."""
    match = _CHECKPOINT.fullmatch(path.name)
    return int(match[1]) if match else None


def metrics_of(path: Path) -> Path:
    """The records of a run folder, or the file itself. Raises InputError where there is none."""
    file = path / METRICS if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{path}: no {METRICS} there; give a run folder that a training verb wrote")
    return file


def check_model_name(name: Path | str) -> None:
    """Raise InputError for a MODEL that is neither on this machine nor a Hub id."""
    text = str(name)
    if not Path(text).expanduser().exists() and (text.count("/") != 1 or text.startswith((".", "/", "~"))):
        raise InputError(
            f"{text}: no such file or folder; give a run, a checkpoint, a model folder or a Hub id such as ORG/NAME"
        )


def tokenizer_of(folder: Path) -> Path | None:
    """Where the tokenizer of a model lies: in its folder, or in tokenizer/ there; None where there is none."""
    places = (folder, folder / TOKENIZER)
    return next((place for place in places if _has(place, TOKENIZER_FILE) or _has(place, VOCABULARY, MERGES)), None)


def model_of_run(run: Path) -> Path | None:
    """Where a run's weights lie: its final model, else the checkpoint that `checkpoint_last` leads to; None before the
    first save.
    """
    if (run / FINAL_MODEL / MODEL_CONFIG).is_file():
        return run / FINAL_MODEL
    return last_checkpoint(run)


def last_checkpoint(run: Path) -> Path | None:
    """The checkpoint that `checkpoint_last` leads to: by a link, or by the name in a file where there are no links; or
    the folder that a copy made of the link. None where it leads nowhere.
    """
    last = followed(run / LAST)
    return last.resolve() if (last / STATE).is_file() else None


def followed(path: Path) -> Path:
    """A path itself, or what a `checkpoint_last` that is a file names."""
    return path.parent / path.read_text().strip() if path.name == LAST and path.is_file() else path


def ending_of(run: Path) -> str | None:
    """COMPLETE or STOPPED, by the marker that lies there; None for a run that is training, or was cut off."""
    return next((name for name in (COMPLETE, STOPPED) if (run / name).exists()), None)
