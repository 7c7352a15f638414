"""Files of conversations rendered once into a cache: ids with the trained ones marked, flat on disk, unit by unit.

A unit (a run of bytes, row groups or record batches) becomes a sealed folder under its final name or nothing: a restart
goes on with the next. `train.bin` and `held_out.bin` hold a uint32 a token, its highest bit set where the token is a
target; `.ends` the positions after each conversation: of a preference pair after the chosen one and after the rejected.
Which are held out is decided by a hash of their text alone, of pairs of their prompt's. Memory: one batch of rows.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO, TypeVar

import numpy as np

from argonne import files
from argonne.data import chat
from argonne.data.chat import THINK, THINK_END, ChatTemplate, Conversation, Rendered
from argonne.data.conversations import ADVICE, fault_of_trace, parse_row, up_to_last_answer, without_nulls
from argonne.data.pairs import Pair, parse_pair
from argonne.errors import InputError
from argonne.prepare import documents
from argonne.prepare.documents import InputFile, Unit
from argonne.prepare.progress import ProgressBar
from argonne.prepare.texts import Refused
from argonne.tokens.shards import Shard, TokenStream

VERSION = 1
TRAINED = np.uint32(1 << 31)
TOO_LONG = ("drop", "drop_oldest_turns", "truncate")
EXAMPLES = 3
ROWS_A_BATCH, CHARACTERS_A_BATCH = 1024, 1 << 20
RENDERED, UNIT_RECORD, HASHES = "rendered.json", "record.json", "hashes-of-input.json"
SIDES = ("train", "held_out")
_HIDDEN = "answers not trained, because their trace is not shown to later turns"
Item = TypeVar("Item", Conversation, Pair)


@dataclass(frozen=True)
class RenderOptions:
    """What decides which rows become which tokens, beside the template. pairs: a row is a preference pair, its chosen
    and its rejected conversation one after the other.
    """

    sequence_length: int
    loss_on: str = "assistant"
    too_long: str = "drop"
    reasoning_required: bool = False
    hold_out: float = 0.0
    pairs: bool = False

    def __post_init__(self) -> None:
        for name, known in (("loss_on", chat.LOSS_ON), ("too_long", TOO_LONG)):
            if getattr(self, name) not in known:
                raise InputError(f"{name}: found {getattr(self, name)!r}, expected {' or '.join(map(repr, known))}")


@dataclass
class Account:
    """Every row of the input: used, or dropped for a reason, with the first lines of each."""

    rows: int = 0
    used: int = 0
    drops: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Any]] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)
    held_out: int = 0
    tokens: int = 0
    held_out_tokens: int = 0
    trained_tokens: int = 0

    def drop(self, reason: str, place: int) -> None:
        self.drops[reason] += 1
        if len(self.examples.setdefault(reason, [])) < EXAMPLES:
            self.examples[reason].append(place)

    def merge(self, other: Account) -> None:
        for name in ("rows", "used", "held_out", "tokens", "held_out_tokens", "trained_tokens"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.drops.update(other.drops)
        self.notes.update(other.notes)
        for reason, places in other.examples.items():
            self.examples[reason] = [*self.examples.get(reason, []), *places][:EXAMPLES]

    def dropped(self) -> str:
        """The dropped rows by reason, each with the first of them and what to do."""
        lines = []
        for reason, count in self.drops.most_common():
            places = ", ".join(map(str, self.examples[reason]))
            lines.append(f"{reason} {count:,} ({places}{'; ' + ADVICE[reason] if reason in ADVICE else ''})")
        return ", ".join(lines)


@dataclass(frozen=True)
class RenderedSet:
    """An opened cache. Token p of a stream has its id in the lower 31 bits; ends: (conversations,) int64, mapped."""

    folder: Path
    fingerprint: str
    train: TokenStream
    held_out: TokenStream
    ends: dict[str, np.ndarray]
    account: Account


def render_files(
    pattern: str,
    template: ChatTemplate,
    options: RenderOptions,
    cache: Path,
    *,
    max_drop_fraction: float = 1.0,
    stream: TextIO | Literal["stderr"] | None = "stderr",
) -> RenderedSet:
    """The conversations of the files that `pattern` matches, out of the cache, into which what is missing is rendered.

    Several processes may ask for the same: one renders, the others wait for it. Raises InputError where no row can be
    used, or more than `max_drop_fraction` cannot, and for a file that cannot be read.
    """
    found = documents.find_files([pattern], outside=cache if cache.exists() else None)
    cache.mkdir(parents=True, exist_ok=True)
    with files.one_at_a_time(cache / ".lock"):
        fingerprint = _fingerprint(found, template, options, cache)
        folder = cache / fingerprint[:24]
        folder.mkdir(exist_ok=True)
        files.collect_temporaries(folder)  # also those of packing
        if not (folder / RENDERED).exists():
            _render_all(found, template, options, folder, stream)
    opened = open_rendered(folder, fingerprint)
    account = opened.account
    names = ", ".join(file.path for file in found[:2]) + (f" and {len(found) - 2:,} more" if len(found) > 2 else "")
    if account.used == account.held_out:
        held = f", {account.held_out:,} held out" if account.held_out else ""
        raise InputError(
            f"{names}: none of {account.rows:,} rows can be trained on{held}: {account.dropped() or 'it is empty'}"
        )
    if sum(account.drops.values()) > max_drop_fraction * account.rows:
        raise InputError(
            f"{names}: {sum(account.drops.values()):,} of {account.rows:,} rows were dropped, more than "
            f"chat.max_drop_fraction {max_drop_fraction:g}: {account.dropped()}; mend them, or allow more"
        )
    return opened


def open_rendered(folder: Path, fingerprint: str) -> RenderedSet:
    """What was rendered into a folder of a cache."""
    tree = files.read_json(folder / RENDERED)
    account = Account()
    account.merge(Account(**tree["account"]))
    streams = [_stream(folder, side, tree["units"]) for side in SIDES]
    ends = {side: _ends(folder / f"{side}.ends") for side in SIDES}
    return RenderedSet(folder, fingerprint, streams[0], streams[1], ends, account)


def _fingerprint(found: list[InputFile], template: ChatTemplate, options: RenderOptions, cache: Path) -> str:
    """What is rendered how: names, sizes and hashes of the files (read once for each time of change), not where they
    lie.
    """
    for left in cache.glob(f"{files.TEMPORARY}{HASHES}-*"):  # by a killed writer; this one is alone
        left.unlink()
    known = files.read_json(cache / HASHES) if (cache / HASHES).exists() else {}
    before = dict(known)
    listed = []
    for file in found:
        if "://" in file.path:
            listed.append([os.path.basename(file.path), file.bytes, None])
            continue
        key = [file.bytes, os.stat(file.path).st_mtime_ns]
        if known.get(file.path, [None])[0] != key:
            known[file.path] = [key, files.sha256_of_file(Path(file.path))]
        listed.append([os.path.basename(file.path), file.bytes, known[file.path][1]])
    if known != before:
        files.write_json(cache / HASHES, known)
    how = [template.template, template.history_reasoning, template.tokenizer.fingerprint, template.turn_end_id]
    chosen = {name: value for name, value in asdict(options).items() if name != "pairs" or value}
    return files.fingerprint([VERSION, chat.VERSION, listed, how, chosen])


def _render_all(
    found: list[InputFile],
    template: ChatTemplate,
    options: RenderOptions,
    folder: Path,
    stream: TextIO | Literal["stderr"] | None,
) -> None:
    target = documents.unit_bytes(found)
    cuts = [(number, *part) for number, file in enumerate(found) for part in documents.cut(file, target, None)]
    units = [Unit(index, *cut) for index, cut in enumerate(cuts)]
    shares = Counter(unit.file for unit in units)
    total = Account()
    bar = ProgressBar("conversations", sum(file.bytes for file in found), stream)
    for unit in units:
        file, place = found[unit.file], folder / f"unit-{unit.index:05d}"
        fresh = not place.exists()
        if fresh:
            with files.atomic_directory(place) as temporary:
                made = render_unit(file, unit, template, options, temporary)
                files.write_json(temporary / UNIT_RECORD, vars(made))
        account = Account(**files.read_json(place / UNIT_RECORD))
        total.merge(account)
        part = unit.stop - unit.start if file.format == "jsonl" and unit.stop >= 0 else file.bytes // shares[unit.file]
        bar.add(part, account.used, account.tokens + account.held_out_tokens, part, fresh=fresh)
    bar.close()
    for side in SIDES:
        _write_ends(folder, side, len(units))
    files.write_json(folder / RENDERED, {"version": VERSION, "units": len(units), "account": vars(total)})


def render_unit(file: InputFile, unit: Unit, template: ChatTemplate, options: RenderOptions, folder: Path) -> Account:
    """Write the tokens and ends of one unit into `folder`; what became of its rows."""
    account = Account()
    lengths: dict[str, list[int]] = {side: [] for side in SIDES}
    with ExitStack() as stack:
        outputs = [stack.enter_context(open(folder / f"{side}.bin", "wb")) for side in SIDES]
        rows = documents.read_rows(file, unit)
        pairs = options.pairs
        usable = _usable_pairs(rows, template, options, account) if pairs else _usable(rows, template, options, account)
        for held, conversations in usable:
            for rendered in conversations:
                outputs[held].write((rendered.ids | np.where(rendered.trained, TRAINED, np.uint32(0))).tobytes())
                lengths[SIDES[held]].append(len(rendered.ids))
                account.trained_tokens += 0 if held else int(np.count_nonzero(rendered.trained[1:]))
            account.used += 1
            account.held_out += held
    for side, sizes in lengths.items():
        np.cumsum(sizes, dtype=np.int64).tofile(folder / f"{side}.ends")
    account.tokens, account.held_out_tokens = (sum(lengths[side]) for side in SIDES)
    for reason, numbers in account.examples.items():
        name = os.path.basename(file.path)
        account.examples[reason] = [f"{name}:{documents.place_of(file, unit, number)}" for number in numbers]
    return account


def _batches(
    rows: Iterable[tuple[int, Any]], parse: Callable[[Any], Item | Refused]
) -> Iterator[list[tuple[int, Item | Refused]]]:
    batch: list[tuple[int, Item | Refused]] = []
    characters = 0
    for number, row in rows:
        found = parse(row if isinstance(row, Refused) else without_nulls(row))
        batch.append((number, found))
        characters += 0 if isinstance(found, Refused) else found.characters
        if len(batch) >= ROWS_A_BATCH or characters >= CHARACTERS_A_BATCH:
            yield batch
            batch, characters = [], 0
    yield batch


def _usable(
    rows: Iterable[tuple[int, Any]], template: ChatTemplate, options: RenderOptions, account: Account
) -> Iterator[tuple[bool, tuple[Rendered, ...]]]:
    """(is it held out, ids) of the conversations that can be trained on."""
    for batch in _batches(rows, parse_row):
        kept: list[tuple[int, Conversation]] = []
        for number, row in batch:
            account.rows += 1
            found = _checked(row, template, options)
            if isinstance(found, Refused):
                account.drop(found.reason, number)
                continue
            if not isinstance(row, Refused) and len(found.messages) < len(row.messages):
                account.notes["rows whose last turns, which nothing answers, were left out"] += 1
            kept.append((number, found))
        rendered = template.render_batch([conversation for _, conversation in kept], options.loss_on)
        for (number, conversation), whole in zip(kept, rendered, strict=True):
            fitted = whole
            if len(whole.ids) > options.sequence_length:
                cut = _fitted(conversation, whole, template, options)
                if cut is None:
                    account.drop("too-long", number)
                    continue
                account.notes[f"rows shortened ({options.too_long})"] += 1
                fitted = cut
            if not fitted.trained[1:].any():
                account.drop("nothing-trained", number)
                continue
            if fitted.context_only:
                account.notes[_HIDDEN] += fitted.context_only
            yield is_held_out(conversation, options.hold_out), (fitted,)


def _usable_pairs(
    rows: Iterable[tuple[int, Any]], template: ChatTemplate, options: RenderOptions, account: Account
) -> Iterator[tuple[bool, tuple[Rendered, ...]]]:
    """(is it held out, ids of the chosen and of the rejected conversation) of pairs that can be trained on. Equal
    prompts fall on one side.
    """
    for batch in _batches(rows, parse_pair):
        kept: list[tuple[int, Pair]] = []
        for number, found in batch:
            account.rows += 1
            if isinstance(found, Refused):
                account.drop(found.reason, number)
            elif template.template == "plain" and found.chosen.uses_tools | found.rejected.uses_tools:
                account.drop("tools-in-plain-template", number)
            else:
                kept.append((number, found))
        rendered = iter(template.render_batch([side for _, pair in kept for side in (pair.chosen, pair.rejected)]))
        for number, pair in kept:
            sides = next(rendered), next(rendered)
            if sum(len(side.ids) for side in sides) > options.sequence_length:
                account.drop("too-long", number)
            elif not all(side.trained[1:].any() for side in sides):
                account.drop("nothing-trained", number)
            else:
                prompt = Conversation(pair.chosen.messages[: pair.chosen.context], pair.chosen.tools)
                yield is_held_out(prompt, options.hold_out), sides


def _checked(row: Conversation | Refused, template: ChatTemplate, options: RenderOptions) -> Conversation | Refused:
    found = row if isinstance(row, Refused) else up_to_last_answer(row)
    if isinstance(found, Refused):
        return found
    if template.template == "plain" and found.uses_tools:
        return Refused("tools-in-plain-template")
    if options.reasoning_required:
        for turn, trained in zip(found.messages, template.targets(found, options.loss_on), strict=True):
            if trained and (fault := fault_of_trace(turn)):
                return Refused(fault)
    return found


def _fitted(
    conversation: Conversation, whole: Rendered, template: ChatTemplate, options: RenderOptions
) -> Rendered | None:
    """A conversation that is too long, shortened as the policy says; None where that leaves nothing. With reasoning
    required rows are only ever dropped.
    """
    if options.too_long == "drop" or options.reasoning_required:
        return None
    turns, length = conversation.messages, options.sequence_length
    if options.too_long == "truncate":
        return _truncated(conversation, whole, template, length)
    first = turns[:1] if turns[0].role == "system" else ()
    for number in [number for number, turn in enumerate(turns) if turn.role == "user"][1:]:
        shorter = template.render(Conversation((*first, *turns[number:]), conversation.tools), options.loss_on)
        if len(shorter.ids) <= length:
            return shorter
    return None


def _truncated(conversation: Conversation, whole: Rendered, template: ChatTemplate, length: int) -> Rendered | None:
    """Cut at `length`, without what follows the last trained token. An answer whose trace would be cut, or stand there
    without a word after it, goes altogether.
    """
    trained = whole.trained[:length]
    if whole.trained[length] and trained[-1]:
        begin = 0 if trained.all() else int(np.flatnonzero(~trained)[-1]) + 1
        after = np.flatnonzero(~whole.trained[length:])
        end = length + int(after[0]) if len(after) else len(whole.ids)
        said, kept = (template.tokenizer.decode(whole.ids[begin:stop]) for stop in (end, length))
        inside = kept.count(THINK) > kept.count(THINK_END) or said.count(THINK_END) > kept.count(THINK_END)
        if inside or (THINK_END in kept and not kept.rpartition(THINK_END)[2].strip()):
            trained = trained[:begin]
    stop = int(np.flatnonzero(trained)[-1]) + 1 if trained.any() else 0
    return Rendered(whole.ids[:stop], trained[:stop], whole.context_only) if stop else None


def is_held_out(conversation: Conversation, share: float) -> bool:
    """By a hash of the text alone: equal conversations fall on one side in every file."""
    if not share:
        return False
    digest = hashlib.blake2b(repr(conversation).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * 2**64


def _write_ends(folder: Path, side: str, units: int) -> None:
    """The ends of all units as positions in the whole stream, in one file that is mapped: ten million are 80 MB."""
    before = 0
    temporary = folder / f"{files.TEMPORARY}{side}.ends"
    with open(temporary, "wb") as out:
        for number in range(units):
            ends = np.fromfile(folder / f"unit-{number:05d}" / f"{side}.ends", np.int64)
            (ends + before).tofile(out)
            before += int(ends[-1]) if len(ends) else 0
    files.fsync_path(temporary)
    os.replace(temporary, folder / f"{side}.ends")


def _ends(path: Path) -> np.ndarray:
    return np.memmap(path, np.int64, "r") if path.stat().st_size else np.zeros(0, np.int64)


def _stream(folder: Path, side: str, units: int) -> TokenStream:
    paths = [folder / f"unit-{number:05d}" / f"{side}.bin" for number in range(units)]
    return TokenStream([Shard(path, "uint32", path.stat().st_size // 4, offset=0) for path in paths])
