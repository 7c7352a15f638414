"""Loss and gradients of conversations in float64: as a run computes them, and by the plain formula one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from argonne.config import BatchSection, ParallelSection, SourceSection
from argonne.data.chat import ChatTemplate, Rendered
from argonne.data.chat_data import ConversationData, open_conversations
from argonne.data.conversations import parse_row, up_to_last_answer
from argonne.data.loader import Loader
from argonne.model import ArgonneForCausalLM
from argonne.model.build import build_model, config_from_fields
from argonne.parallel.launch import run_workers
from argonne.parallel.mesh import Mesh, open_mesh
from argonne.parallel.objective import Head, Loss, MicroBatch
from argonne.parallel.parallelise import replicate
from argonne.prepare.texts import Refused
from argonne.tokens.tokenizer import TextTokenizer, load_tokenizer
from argonne.train.objectives import next_token
from argonne.train.optim import Precision
from tests.model.conftest import GENERATIONS, roughen

CPU = torch.device("cpu")
SIZES = {"vocab_size": 400, "max_position_embeddings": 512, "num_hidden_layers": 2}
TINY: dict[str, dict[str, Any]] = {
    name: {**fields, **SIZES, "layer_types": ["full_attention", "full_attention"]}
    for name, fields in GENERATIONS.items()
}
TINY["1"] |= {"attention_dropout": 0.0, "hidden_dropout": 0.0}
TINY["3-window"] |= {"layer_types": ["full_attention", "sliding_attention"]}


@dataclass(frozen=True)
class Filled:
    """Weights of a model that has them already."""

    model: ArgonneForCausalLM

    def fill(self, device: torch.device | str, ended: Callable[[torch.nn.Module], object] = id, /) -> torch.nn.Module:
        for layer in self.model.model.layers:
            ended(layer)
        return self.model


# The loss, and the gradient of each tensor.
Found = tuple[float, dict[str, torch.Tensor]]


def make(generation: str) -> ArgonneForCausalLM:
    """As in training, without dropout."""
    return roughen(build_model(config_from_fields(TINY[generation]), seed=0, dtype=torch.float64)).train()


def opened(
    source: Path, tokenizer: TextTokenizer, length: int = 256, seed: int = 1, loss_on: str = "assistant"
) -> ConversationData:
    """Conversations as a run reads them. The first step is a whole epoch: each conversation once."""

    def open_with(rows: int) -> ConversationData:
        return open_conversations(
            [SourceSection(path=str(source), max_epochs=9)],
            tokenizer=tokenizer,
            loss_on=loss_on,
            sequence_length=length,
            cache=source.parent / "cache",
            batch=BatchSection(tokens_per_step=rows * length),
            seed=seed,
        )

    return open_with(open_with(1).tokens_per_epoch // length)


def rendered(rows: Sequence[Mapping[str, Any]], tokenizer: TextTokenizer, length: int = 256) -> list[Rendered]:
    """Each conversation that can be trained on, by the template alone."""
    template, found = ChatTemplate(tokenizer), []
    for row in rows:
        parsed = parse_row(row)
        whole = parsed if isinstance(parsed, Refused) else up_to_last_answer(parsed)
        if not isinstance(whole, Refused):
            one = template.render(whole)
            found += [one] if len(one.ids) <= length and one.trained[1:].any() else []
    return found


def one_by_one(model: ArgonneForCausalLM, conversations: Sequence[Rendered]) -> Found:
    """Each conversation in a forward pass of its own, and torch's cross-entropy of its trained tokens over all of
    them.
    """
    model.zero_grad()
    count = sum(int(one.trained[1:].sum()) for one in conversations)
    total = 0.0
    for one in conversations:
        ids, trained = torch.from_numpy(one.ids.astype("int64")), torch.from_numpy(one.trained)
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        loss = F.cross_entropy(logits[trained[1:]], ids[1:][trained[1:]], reduction="sum") / count
        loss.backward()
        total += loss.item()
    return total, gradients(model)


def in_micro_batches(
    model: ArgonneForCausalLM, micro_batches: Sequence[MicroBatch], count: int, mesh: Mesh | None = None
) -> Found:
    """This rank's share of the loss, and the gradients, by the way that a training step goes."""
    model.zero_grad()
    totals: list[torch.Tensor] = []

    def objective(head: Head, hidden: torch.Tensor, micro: MicroBatch) -> Loss:
        loss = next_token(head, hidden, micro)
        totals.append(loss.total.detach())  # what the loop adds up for its records is fp32
        return loss

    mesh = mesh or Mesh(CPU)
    replicate(Filled(model), mesh, objective, Precision("fp32", CPU)).forward_backward(micro_batches, count)
    return float(sum(totals)) / count, gradients(model)


def in_one_process(model: ArgonneForCausalLM, data: ConversationData, micro_rows: int) -> Found:
    with Loader(data, 0, 1, micro_rows, prefetch=0) as loader:
        batch = loader.batch(0)
    return in_micro_batches(model, batch.micro_batches, batch.count)


def on_ranks(
    generation: str, source: Path, tokenizer: Path, micro_rows: int, ranks: int = 2
) -> tuple[Found, list[int]]:
    """What the ranks come to together, which must be the same on each; and the micro-batches of each that train
    nothing.
    """
    arguments = (generation, source, tokenizer, micro_rows)
    parts = run_workers(_rank, arguments, count=ranks, max_restarts=0, grace_seconds=5, preload=(__name__,))
    for _, found, _ in parts[1:]:
        assert all((found[name] == one).all() for name, one in parts[0][1].items())
    whole = {name: torch.from_numpy(one) for name, one in parts[0][1].items()}
    return (sum(loss for loss, _, _ in parts), whole), [masked for _, _, masked in parts]


def _rank(generation: str, source: Path, tokenizer: Path, micro_rows: int) -> tuple[float, dict[str, np.ndarray], int]:
    torch.set_num_threads(1)
    with open_mesh(ParallelSection(), "cpu", timeout_seconds=60) as mesh:
        data = opened(source, load_tokenizer(tokenizer))
        with Loader(data, mesh.data_rank, mesh.data_size, micro_rows, prefetch=0) as loader:
            batch = loader.batch(0)
        count = mesh.sum_later([batch.count])()[0]
        loss, found = in_micro_batches(make(generation), batch.micro_batches, count, mesh)
        masked = sum(not (micro["shift_labels"] >= 0).any() for micro in batch.micro_batches)
        # As arrays: tensors would be handed over by a worker that has ended by then.
        return loss, {name: one.numpy() for name, one in found.items()}, masked


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_equal(found: Found, expected: Found, relative: float = 1e-12) -> None:
    """To rounding in float64: the loss, and each tensor by its own largest value. A bias of keys moves no weight of
    attention: its gradient is nothing but rounding, and is held to a thousandth of the largest gradient.
    """
    assert abs(found[0] - expected[0]) <= relative * abs(expected[0])
    assert found[1].keys() == expected[1].keys()
    largest = max(one.abs().max().item() for one in expected[1].values())
    for name, one in expected[1].items():
        scale = 1e-3 * largest if name.endswith("k_proj.bias") else one.abs().max().item()
        assert scale > 0, name
        assert (found[1][name] - one).abs().max().item() <= relative * scale, name
