"""Greedy answers of several prompts at once by llama.cpp, through its own batches, as its server makes them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any


class Engine:
    """A model of ours as a GGUF file, and a context for `rows` answers of at most `context` tokens. What is no flag
    here is as llama.cpp has it: keys and values in fp16.
    """

    def __init__(self, model: Any, dtype: str, rows: int, context: int) -> None:
        import llama_cpp
        import torch
        from llama_cpp._logger import set_verbose

        from argonne.model.build import Weights
        from argonne.publish.gguf_export import write_gguf

        set_verbose(False)
        tensors = sorted((name, parameter.detach()) for name, parameter in model.named_parameters())
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.gguf"
            write_gguf(file, Weights(model, lambda: iter(tensors)), dtype, None)
            self.model = llama_cpp.llama_model_load_from_file(
                str(file).encode(), llama_cpp.llama_model_default_params()
            )
        how = llama_cpp.llama_context_default_params()
        how.n_ctx, how.n_batch, how.n_seq_max = rows * context, rows * context, rows
        how.n_threads = how.n_threads_batch = torch.get_num_threads()
        self.context = llama_cpp.llama_init_from_model(self.model, how)
        self.batch = llama_cpp.llama_batch_init(rows * context, 0, 1)
        self.vocabulary = model.config.vocab_size

    def read(self, tokens: list[tuple[int, int, int, bool]]) -> list[int]:
        """tokens: id, position, row, is an answer wanted behind it. The likeliest next ids, where they are wanted."""
        import llama_cpp
        import numpy as np

        self.batch.n_tokens = len(tokens)
        for place, (token, position, row, wanted) in enumerate(tokens):
            self.batch.token[place], self.batch.pos[place] = token, position
            self.batch.n_seq_id[place], self.batch.seq_id[place][0] = 1, row
            self.batch.logits[place] = wanted
        if code := llama_cpp.llama_decode(self.context, self.batch):
            raise RuntimeError(f"llama_decode of {len(tokens)} tokens ended with {code}")
        found = []
        for place, (*_, wanted) in enumerate(tokens):
            if wanted:
                logits = llama_cpp.llama_get_logits_ith(self.context, place)
                found.append(int(np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax()))
        return found


def generate(engine: Engine, rows: list[list[int]], new: int) -> list[list[int]]:
    """The greedy answers, `new` tokens each."""
    import llama_cpp

    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(engine.context), True)
    last = len(rows[0]) - 1
    prompt = [(token, at, row, at == last) for row, ids in enumerate(rows) for at, token in enumerate(ids)]
    steps = [engine.read(prompt)]
    for position in range(last + 1, last + new):
        steps.append(engine.read([(token, position, row, True) for row, token in enumerate(steps[-1])]))
    return [list(ids) for ids in zip(*steps, strict=True)]
