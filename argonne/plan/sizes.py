"""Which model a text, a machine and a time are enough for: what `argonne train` chooses. Pure arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from argonne.config import BatchSection, DataSection, ModelSection, OptimSection, Recipe, TrainSection
from argonne.errors import InputError
from argonne.operation import ParallelSection
from argonne.plan.devices import Device, best_choice, expected_rate
from argonne.plan.shape import shape_of
from argonne.presets import preset

PER_PARAMETER = 20  # tokens a parameter at which compute is spent best (Hoffmann et al. 2022, arXiv 2203.15556)
FEW = 4  # passes that are worth almost as much as new text (Muennighoff et al. 2023, arXiv 2305.16264)
# Passes at most, where the text is too small to feed the smallest model in a few, and has a token a parameter. Of nine
# parameters a token the held-out loss rose after six passes (docs/sizes.md).
MANY = 20
LEAST_TOKENS, LEAST_STEPS, GOOD_STEPS = 10_000, 10, 200
CHARACTERS_A_TOKEN = 3.5  # of the tokenizers that are trained here, in English: an estimate before there is one
VOCABULARIES = (2048, 4096, 8192, 16384, 32768)
ROWS = 4  # a step at least


class Size(NamedTuple):
    """A rung of the ladder: fields of the model, the last of which is the length of the rows, and the tokens of a
    step.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    batch: int


# Each about twice the one before, from 1M to 350M parameters; heads of 64 as soon as there are several.
LADDER = (
    Size(128, 4, 4, 2, 32, 384, 256, 2048),
    Size(192, 6, 6, 2, 32, 512, 256, 4096),
    Size(256, 6, 4, 2, 64, 704, 512, 8192),
    Size(320, 7, 5, 1, 64, 832, 512, 8192),
    Size(384, 8, 6, 2, 64, 1024, 512, 16384),
    Size(512, 10, 8, 4, 64, 1408, 512, 32768),
    Size(640, 12, 10, 2, 64, 1728, 1024, 65536),
    Size(768, 14, 12, 4, 64, 2048, 1024, 131072),
    Size(1024, 16, 16, 4, 64, 2816, 1024, 262144),
    Size(1280, 20, 20, 4, 64, 3456, 1024, 262144),
)
# The newest architecture of the family, with a base of the positions for these contexts.
ARCHITECTURE = {**preset("argonne-4.0").fields, "layer_types": None, "rope_theta": 1e4}


@dataclass(frozen=True)
class Choice:
    """A model for a text: `recipe` has its sections model, data.sequence_length, batch, optim and train.steps.

    rate: tokens a second that are expected. larger: why the next larger size was not taken, in words; None for the
    largest there is.
    """

    recipe: Recipe
    parameters: int
    tokens: int
    passes: float
    rate: float
    larger: str | None


def vocabulary_for(text_bytes: float, hours: float, device: Device, gpus: int = 1) -> int:
    """Entries of a tokenizer for so much text, and so much time: twice as many for a model four times as large, so that
    the table stays a part of it.
    """
    fed = FEW * text_bytes / CHARACTERS_A_TOKEN / PER_PARAMETER
    flops = (device.sustained or device.expected_use * (device.bf16 or device.fp16 or 0)) * gpus * hours * 3600
    wanted = min(fed, math.sqrt(max(0, flops) / (6 * PER_PARAMETER))) / 1e6  # million parameters
    steps = int(math.log(wanted, 4)) if wanted > 1 else 0
    return VOCABULARIES[min(steps, len(VOCABULARIES) - 1)]


def choose_size(text_tokens: int, vocabulary: int, hours: float, device: Device, gpus: int = 1) -> Choice:
    """The largest model of the ladder that the time allows and the text feeds with `PER_PARAMETER` tokens a parameter,
    read `FEW` times at most, and that fits into memory; the smallest where none does, which reads a small text more
    often. The same for the same arguments.

    text_tokens: one pass. device: with its speed, in `sustained` where it is none with a peak. Raises InputError for
    too little text, no time, or a device that holds no model at all.
    """
    if text_tokens < LEAST_TOKENS:
        raise InputError(
            f"the text has about {text_tokens:,} tokens to train on, expected at least {LEAST_TOKENS:,}, some "
            f"{LEAST_TOKENS * CHARACTERS_A_TOKEN / 1000:.0f} kB of text; give more"
        )
    if not 0 < hours < math.inf:
        raise InputError(f"--hours: found {hours:g}, expected more than 0")
    best: Choice | None = None
    for size in LADDER:
        found = _choice(size, text_tokens, vocabulary, hours, device, gpus)
        if found is None:
            why = f"does not fit into the memory of {device.name}"
        else:
            needed = PER_PARAMETER * found.parameters
            missing = [f"{needed / found.rate / 3600:,.1f} hours"] * (needed > found.rate * hours * 3600)
            if needed > FEW * text_tokens:
                missing.append(f"{needed / FEW / 1e6:,.1f}M tokens of text")
            if best is None or not missing:
                best = found
                continue
            why = f"of {found.parameters / 1e6:,.1f}M parameters would want {' and '.join(missing)}"
        if best is None:
            raise InputError(f"{device.name}: even the smallest model {why}; use a machine with more")
        return replace(best, larger=f"the next size {why}")
    assert best is not None
    return best


def _choice(size: Size, text_tokens: int, vocabulary: int, hours: float, device: Device, gpus: int) -> Choice | None:
    """A run of this size; None where it does not fit into memory."""
    fields, rows = {**ARCHITECTURE, **size._asdict(), "vocab_size": vocabulary}, size.max_position_embeddings
    fields.pop("batch")
    model = ModelSection(**fields)
    # The rate of embeddings and gains falls with the width; Muon's, of the matrices, holds for all widths.
    rate = float(f"{5e-3 * math.sqrt(LADDER[0].hidden_size / size.hidden_size):.1g}")
    recipe = Recipe(
        model=model,
        data=DataSection(sequence_length=rows),
        batch=BatchSection(size.batch),
        optim=OptimSection(name="muon", lr=rate),
        parallel=ParallelSection(replicate=gpus),
    )
    shape = shape_of(model, rows)
    way = best_choice(recipe, shape, device, gpus)
    if not way.fits:
        return None
    speed = expected_rate(way, device, gpus, shape)[1]
    if speed is None:
        raise InputError(f"{device.name}: its speed is not known, and no size can be chosen for a time; measure it")
    parameters = shape.parameters()
    often = max(FEW, min(MANY, MANY * text_tokens / parameters))  # with less text it is learnt by heart before
    readable = max(FEW * text_tokens, min(int(often * text_tokens), PER_PARAMETER * parameters))
    tokens, batch = min(int(speed * hours * 3600), readable), size.batch
    least = rows * max(ROWS, gpus)
    while tokens < GOOD_STEPS * batch and batch > least:
        batch //= 2
    steps = max(LEAST_STEPS, tokens // batch)
    recipe = replace(recipe, batch=BatchSection(batch), train=TrainSection(steps=steps))
    return Choice(recipe, parameters, steps * batch, steps * batch / text_tokens, speed, None)
