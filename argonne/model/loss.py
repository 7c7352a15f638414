"""Linear head and cross-entropy in one, without ever holding all logits. Ships with each checkpoint: imports nothing
but torch.

Notation: h (N, H) hidden states, W (V, H) the head's weight, x = h W^T, y = cap tanh(x / cap) with a softcap and y = x
without. Per token: loss = logsumexp(y) - y[target] + z_loss * logsumexp(y)^2. Every total is a SUM over the targets
that are not -100. "fp32" means at least fp32: sums are kept in promote_types(dtype, float32), so that float64 models
are exact to float64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100
# On a GPU, rows of 16-bit logits that do not begin at a multiple of 16 bytes run on a kernel three times slower
# (a vocabulary of 151,669): the head's copy in that dtype is padded to a multiple of this.
PADDED_TO = 64


@dataclass(frozen=True)
class LossOptions:
    """How the loss is computed; no field changes what is computed but `softcap` and `z_loss`.

    chunk: rows of h whose logits exist at the same time; 0 = chosen by size.
    group: process group over which the rows of W are split (tensor parallelism); this rank holds W[first : first +
    V_local].
    onednn: products with W by oneDNN where they are of fp32 on a CPU, as the layer of the head does.
    """

    softcap: float | None = None
    z_loss: float = 0.0
    chunk: int = 0
    group: dist.ProcessGroup | None = None
    first: int = 0
    onednn: bool = False


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b by oneDNN, of fp32 on a CPU: x (.., in), W (out, in) in any layout."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


def rows_of_chunk(options: LossOptions, rows: int, vocabulary: int, device: torch.device) -> int:
    """Rows whose logits are held at once: as given, or at least 256 (below, the matrix products slow down) and as many
    as fit into 32 MiB of fp32 logits on the CPU, into 1 GiB elsewhere."""
    if options.chunk:
        return min(options.chunk, rows)
    budget = (1 << 25 if device.type == "cpu" else 1 << 30) // (4 * vocabulary)
    return min(rows, max(256, budget // 64 * 64))


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of the matrix products: autocast's where it is on, otherwise that of the hidden states."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _head_in(dtype: torch.dtype, weight: Tensor) -> Tensor:
    """The head's weight in the dtype of its matrix products, padded where that is faster."""
    return weight.to(dtype) if weight.device.type == "cpu" or dtype.itemsize != 2 else padded(dtype, weight)


def padded(dtype: torch.dtype, weight: Tensor) -> Tensor:
    """A copy of (V, H) with rows of zeros up to the next multiple of PADDED_TO."""
    return F.pad(weight.to(dtype), (0, 0, 0, -weight.shape[0] % PADDED_TO))


class _Logits:
    """Capped logits of one chunk and what the derivative needs. `vocabulary`: rows of the weight that are no padding;
    the others get probability 0.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        options: LossOptions,
        vocabulary: int,
        buffers: Tensor | None = None,
    ) -> None:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        rows = hidden.shape[0]
        self.onednn = options.onednn and hidden.device.type == "cpu" and hidden.dtype == torch.float32
        if self.onednn:
            x = product(hidden, weight)
        else:
            x = torch.mm(hidden, weight.t(), out=None if buffers is None else buffers[0, :rows]).to(wide)
        self.slope: Tensor | None = None
        if options.softcap:
            slope = torch.tanh_(x.div_(options.softcap))
            x = torch.mul(slope, options.softcap, out=None if buffers is None else buffers[1, :rows])
            self.slope = slope.square_().neg_().add_(1)
        if vocabulary < weight.shape[0]:
            x[:, vocabulary:] = -torch.inf
        self.valid = targets != IGNORED
        column = torch.where(self.valid, targets - options.first, 0)
        here = (column >= 0) & (column < vocabulary) & self.valid
        self.column = torch.where(here, column, 0)[:, None]
        self.here = here.to(wide)[:, None]
        chosen = x.gather(1, self.column)
        if options.group is None:
            self.log_p = torch.log_softmax(x, -1, out=x) if x.device.type == "cpu" else torch.log_softmax(x, -1)
            self.target_log_p = self.log_p.gather(1, self.column)[:, 0]
            self.log_z = chosen[:, 0] - self.target_log_p
        else:
            highest = x.amax(-1)
            dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=options.group)
            total = torch.exp(x - highest[:, None]).sum(-1)
            dist.all_reduce(total, group=options.group)
            self.log_z = highest + total.log()
            chosen = chosen * self.here
            dist.all_reduce(chosen, group=options.group)
            self.log_p = x.sub_(self.log_z[:, None])
            self.target_log_p = chosen[:, 0] - self.log_z

    def add_gradients(
        self,
        hidden: Tensor,
        weight: Tensor,
        on_target: Tensor,
        on_log_z: Tensor,
        into: _Gradients,
        part: slice | Tensor,
    ) -> None:
        """d(sum on_log_z * log_z - on_target * y[target]), of h the rows `part`. Consumes the logits."""
        slope, p = self.slope, self.log_p.exp_()
        on_target = on_target[:, None] * self.here
        if slope is not None:
            on_target = on_target * slope.gather(1, self.column)
            p.mul_(slope)
        on_log_z = on_log_z[:, None]
        p = p.to(weight.dtype)
        if into.weight is not None:
            scaled = (hidden * on_log_z).to(weight.dtype)
            if into.weight.dtype == p.dtype:
                into.weight.addmm_(p.t(), scaled)
            else:
                into.weight.add_(torch.mm(p.t(), scaled))
            into.weight.index_add_(0, self.column[:, 0], (hidden * -on_target).to(into.weight.dtype))
        if into.hidden is not None:
            found = product(p, weight.t()) if self.onednn else torch.mm(p, weight)
            gradient = found.to(on_log_z.dtype) * on_log_z
            into.hidden[part] = gradient.sub_(F.embedding(self.column[:, 0], weight) * on_target)


class _Gradients:
    """Gradients of h and W, at least in fp32, filled chunk by chunk; None for one that nobody asks for."""

    def __init__(self, ctx: Any, hidden: Tensor, weight: Tensor, head: Tensor) -> None:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        self.dtypes = hidden.dtype, weight.dtype
        self.hidden = torch.zeros_like(hidden, dtype=wide) if ctx.needs_input_grad[0] else None
        rows = head.shape[0]  # with those of the padding
        self.weight = weight.new_zeros(rows, weight.shape[1], dtype=wide) if ctx.needs_input_grad[1] else None
        self.vocabulary = weight.shape[0]

    def given_back(self) -> tuple[Tensor | None, Tensor | None, None, None]:
        """What backward returns, one for each argument of forward."""
        of_head = None if self.weight is None else self.weight[: self.vocabulary]
        found = zip((self.hidden, of_head), self.dtypes, strict=True)
        of_hidden, of_weight = (None if gradient is None else gradient.to(dtype) for gradient, dtype in found)
        return of_hidden, of_weight, None, None


class _SummedLoss(torch.autograd.Function):
    """Sum of the token losses, and its part that is z-loss, which has no derivative of its own; the gradients are made
    in the forward pass, where the logits are, so that nothing is computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, options: LossOptions
    ) -> tuple[Tensor, Tensor]:
        dtype = compute_dtype(hidden)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        penalty = torch.zeros_like(total)
        with torch.autocast(hidden.device.type, enabled=False):
            head = _head_in(dtype, weight)
            gradients = _Gradients(ctx, hidden, weight, head)
            rows = _rows_that_count(targets)
            picked = targets if rows is None else targets[rows]
            chunk = rows_of_chunk(options, max(1, picked.shape[0]), weight.shape[0], hidden.device)
            # Fresh memory for each chunk costs the CPU a page fault for every 4 KiB; a GPU's allocator has it at hand.
            reusable = hidden.device.type == "cpu" and dtype == wide
            buffers = torch.empty(2 if options.softcap else 1, chunk, head.shape[0], dtype=dtype) if reusable else None
            for start in range(0, picked.shape[0], chunk):
                part = slice(start, start + chunk) if rows is None else rows[start : start + chunk]
                h, t = hidden[part].to(dtype), targets[part]
                logits = _Logits(h, head, t, options, weight.shape[0], buffers)
                log_z = torch.where(logits.valid, logits.log_z, 0)
                total -= torch.where(logits.valid, logits.target_log_p, 0).sum()
                if options.z_loss:
                    penalty += options.z_loss * log_z.square().sum()
                if gradients.hidden is not None or gradients.weight is not None:
                    valid = logits.valid.to(wide)
                    logits.add_gradients(h, head, valid, valid * (1 + 2 * options.z_loss * log_z), gradients, part)
            if gradients.hidden is not None and options.group is not None:
                dist.all_reduce(gradients.hidden, group=options.group)
        # Not save_for_backward: handed over once and scaled in place, or the head's gradient would exist twice.
        ctx.gradients = gradients
        ctx.mark_non_differentiable(penalty)
        return total + penalty, penalty

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "the summed loss hands its gradients over once: call the model again instead of a second backward"
            )
        for gradient in (gradients.hidden, gradients.weight):
            if gradient is not None:
                gradient.mul_(upstream)
        returned: tuple[Tensor | None, Tensor | None, None, None] = gradients.given_back()
        return returned


class _TokenLogProbs(torch.autograd.Function):
    """Per-token log-probability and log-partition. Upstream gradients are unknown until backward: logits are made again
    there.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, options: LossOptions
    ) -> tuple[Tensor, Tensor]:
        dtype = compute_dtype(hidden)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        log_p = torch.zeros(targets.shape, dtype=wide, device=hidden.device)
        log_z = torch.zeros_like(log_p)
        chunk = rows_of_chunk(options, max(1, targets.shape[0]), weight.shape[0], hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            head = _head_in(dtype, weight)
            for start in range(0, targets.shape[0], chunk):
                part = slice(start, start + chunk)
                logits = _Logits(hidden[part].to(dtype), head, targets[part], options, weight.shape[0])
                log_p[part] = torch.where(logits.valid, logits.target_log_p, 0)
                log_z[part] = torch.where(logits.valid, logits.log_z, 0)
        ctx.save_for_backward(hidden, weight, targets)
        ctx.settings = options, dtype, chunk
        return log_p, log_z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, on_log_p: Tensor, on_log_z: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight, targets = ctx.saved_tensors
        options, dtype, chunk = ctx.settings
        with torch.autocast(hidden.device.type, enabled=False):
            head = _head_in(dtype, weight)
            gradients = _Gradients(ctx, hidden, weight, head)
            for start in range(0, targets.shape[0], chunk):
                part = slice(start, start + chunk)
                h = hidden[part].to(dtype)
                logits = _Logits(h, head, targets[part], options, weight.shape[0])
                valid = logits.valid.to(on_log_p.dtype)
                on_target = -on_log_p[part] * valid  # log_p = y[target] - log_z
                logits.add_gradients(h, head, on_target, on_target + on_log_z[part] * valid, gradients, part)
            if gradients.hidden is not None and options.group is not None:
                dist.all_reduce(gradients.hidden, group=options.group)
        return gradients.given_back()


def _rows_that_count(targets: Tensor) -> Tensor | None:
    """Indices of the targets that are not -100, or None for all. On the CPU only: elsewhere the answer would cost a
    synchronisation.
    """
    if targets.device.type != "cpu":
        return None
    valid = targets != IGNORED
    return None if bool(valid.all()) else valid.nonzero()[:, 0]


def summed_loss(hidden: Tensor, weight: Tensor, targets: Tensor, options: LossOptions) -> Tensor:
    """Sum of the token losses as a scalar; exactly 0 with zero gradients where every target is -100.

    Shapes: hidden (N, H), weight (V, H), targets (N,) with -100 where nothing is trained.
    """
    loss, _ = _SummedLoss.apply(hidden, weight, targets, options)
    return loss


@dataclass(frozen=True)
class Head:
    """What turns final hidden states into logits and losses: all that an objective sees of a model, so that a last
    pipeline stage can run it.

    weight: (V, H). hidden: (B, T, H) after the final norm; labels: (B, T), -100 = not trained. whole: all logits at
    once, not in chunks.
    """

    weight: Tensor
    options: LossOptions
    whole: bool = False

    @property
    def z_loss(self) -> float:
        return self.options.z_loss

    def of_part(self, weight: Tensor, first: int, group: dist.ProcessGroup) -> Head:
        """The head of a vocabulary that a group splits: this rank has `weight`, its rows from `first` on. Losses are
        whole; `logits` are those of its rows.
        """
        return replace(self, weight=weight, options=replace(self.options, first=first, group=group))

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., V) capped logits of (..., H) hidden states."""
        logits, cap = F.linear(hidden, self.weight), self.options.softcap
        return torch.tanh(logits / cap) * cap if cap else logits

    def summed_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Sum of the token losses over the labels that are not -100."""
        return self.loss_and_penalty(hidden, labels)[0]

    def loss_and_penalty(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and its part that is z-loss, without a derivative."""
        flat, targets, options = self._flat(hidden, labels)
        loss, penalty = _SummedLoss.apply(flat, self.weight, targets, options)
        return loss, penalty

    def token_log_probs(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """log p(label) and log-partition of each token, both (B, T), differentiable, 0 where the label is -100."""
        flat, targets, options = self._flat(hidden, labels)
        log_p, log_z = token_log_probs(flat, self.weight, targets, options)
        return log_p.view(labels.shape), log_z.view(labels.shape)

    def _flat(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, LossOptions]:
        if labels.shape != hidden.shape[:-1]:
            raise ValueError(
                f"shift_labels has shape {tuple(labels.shape)}; expected that of the inputs, {tuple(hidden.shape[:-1])}"
            )
        options = replace(self.options, chunk=labels.numel()) if self.whole else self.options
        return hidden.flatten(0, -2), labels.flatten(), options


def token_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor, options: LossOptions) -> tuple[Tensor, Tensor]:
    """log p(target) and log-partition of each token, both (N,), differentiable, 0 where the target is -100."""
    log_p, log_z = _TokenLogProbs.apply(hidden, weight, targets, options)
    return log_p, log_z
