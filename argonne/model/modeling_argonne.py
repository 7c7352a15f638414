"""Argonne language models, all generations in one class, for training and for the Hub. Ships with each checkpoint.

Needs torch, transformers and the sibling files, nothing else. Module names are fixed: exports, parallel plans and
engines read them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .attention import IMPLEMENTATION, LayerInputs, attention_patterns, prepare_patterns
from .configuration_argonne import Argonne1Config, ArgonneConfig
from .kernels import ORDER
from .layers import ArgonneAttention, ArgonneDecoderLayer, ArgonneRotaryEmbedding, TrainingOptions, make_norm
from .loss import IGNORED, Head, LossOptions


class ArgonnePreTrainedModel(PreTrainedModel):
    """Residual projections are scaled by build_model only: here every matrix is drawn with `initializer_range`."""

    config_class = ArgonneConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ArgonneDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: ArgonneConfig, *inputs: Any, **kwargs: Any) -> None:
        config.check_architecture()  # a field may have been changed since the config was made
        if config._attn_implementation is None:
            config._attn_implementation = IMPLEMENTATION
        super().__init__(config, *inputs, **kwargs)

    def _set_gradient_checkpointing(self, *how: Any, every_n_layers: int = 1, **more: Any) -> None:
        super()._set_gradient_checkpointing(*how, **more)
        base: Any = self.base_model
        base.recomputed_stride = every_n_layers


class ArgonneBaseModel(ArgonnePreTrainedModel):
    """Token ids to hidden states."""

    def __init__(self, config: ArgonneConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.position_embedding == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        else:
            self.rotary_emb = ArgonneRotaryEmbedding(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList(ArgonneDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = make_norm(config, config.hidden_size)
        self.gradient_checkpointing, self.recomputed_stride = False, 1
        self._gradient_checkpointing_func: Callable[..., Any] = partial(checkpoint, use_reentrant=False)
        self.training_options = TrainingOptions()
        self.post_init()

    def embed(
        self, input_ids: Tensor | None, position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        """(B, T) ids to (B, T, H). Learned positions are added here; past the table they are a ValueError."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, not both and not neither")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.config.position_embedding == "learned":
            if position_ids is None:
                position_ids = torch.arange(hidden.shape[1], device=hidden.device)[None]
            # Where the positions lie on a GPU their largest would cost a wait, and traced code has none: there the
            # length is all that is looked at.
            last = hidden.shape[1] - 1
            if position_ids.device.type == "cpu" and position_ids.numel() and not torch.compiler.is_compiling():
                last = max(last, int(position_ids.max()))
            if last >= self.config.max_position_embeddings:
                raise ValueError(
                    f"position {last} is beyond the table of learned positions: max_position_embeddings is "
                    f"{self.config.max_position_embeddings}; shorten the text"
                )
            there = position_ids.to(hidden.device, non_blocking=True)
            hidden = hidden + self.embed_positions(there).to(hidden.device)
        return self.dropout(hidden)

    def layer_inputs(
        self,
        hidden: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Any = None,
        cache: Cache | None = None,
        extra: dict[str, Any] | None = None,
        weights: list[Tensor] | None = None,
    ) -> LayerInputs:
        """Positions and masks for one forward pass. Explicit position_ids that restart mark the documents of a row.

        They may lie on the CPU while the model is on a GPU: then nothing here waits for the GPU.
        """
        explicit = position_ids is not None
        positions = self._positions(hidden, attention_mask, cache) if position_ids is None else position_ids
        masks = attention_patterns(self.config, hidden, attention_mask, positions, cache, explicit)
        kernels = (layer.self_attn.attention_kernel for layer in self.layers if isinstance(layer, ArgonneDecoderLayer))
        prepare_patterns(masks, self.config, hidden, next(kernels, "auto"))
        there = positions.to(hidden.device, non_blocking=True)
        cos, sin = self.rotary_emb(there, hidden.dtype) if self.config.position_embedding == "rope" else (None, None)
        return LayerInputs(cos, sin, masks, cache, extra or {}, weights)

    @staticmethod
    def _positions(hidden: Tensor, attention_mask: Any, cache: Cache | None) -> Tensor:
        """0, 1, 2... after what the cache holds; with a 2-D mask only real tokens count: left padding moves nothing."""
        length = hidden.shape[1]
        if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
            return (attention_mask.to(torch.int64).cumsum(-1) - 1).clamp_min(0)[:, -length:].to(hidden.device)
        past: Any = 0 if cache is None else cache.get_seq_length()  # a tensor in a static cache
        return torch.arange(length, device=hidden.device)[None] + past

    def recomputes(self, layer: int) -> bool:
        """Is this layer run again in the backward pass, by our own switch or transformers'?"""
        theirs = self.gradient_checkpointing and layer % self.recomputed_stride == 0
        return self.training and (theirs or self.training_options.recomputes(layer))

    def run_layers(
        self,
        hidden: Tensor,
        start: int = 0,
        stop: int | None = None,
        *,
        position_ids: Tensor | None = None,
        inputs: LayerInputs | None = None,
        record: list[Tensor] | None = None,
    ) -> Tensor:
        """Layers start .. stop - 1. `record` collects what enters each layer."""
        inputs = self.layer_inputs(hidden, position_ids) if inputs is None else inputs
        for index in range(start, len(self.layers) if stop is None else stop):
            if record is not None:
                record.append(hidden)
            if torch.is_grad_enabled() and self.recomputes(index):
                hidden = self._gradient_checkpointing_func(self.layers[index], hidden, inputs)
            else:
                hidden = self.layers[index](hidden, inputs)
        return hidden

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Normed hidden states (B, T, H). cache: past_key_values since transformers 5.24. kwargs: for the attention."""
        config, past_key_values = self.config, past_key_values if cache is None else cache
        keeps = config.output_attentions if output_attentions is None else output_attentions
        if keeps and config._attn_implementation != "eager":
            raise ValueError(
                f"output_attentions is on and the attention is {config._attn_implementation!r}, which keeps no "
                "weights; load the model with attn_implementation='eager', or call set_attn_implementation('eager')"
            )
        use_cache = (config.use_cache and not self.training) if use_cache is None else use_cache
        if (use_cache or past_key_values is not None) and any(map(self.recomputes, range(len(self.layers)))):
            warnings.warn(
                "a cache is incompatible with gradient checkpointing, which would fill it twice: going on without",
                stacklevel=2,
            )
            use_cache, past_key_values = False, None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config)
        record: list[Tensor] | None = [] if (output_hidden_states or config.output_hidden_states) else None
        weights: list[Tensor] | None = [] if keeps else None
        learned, source = position_ids, input_ids if inputs_embeds is None else inputs_embeds
        if config.position_embedding == "learned" and position_ids is None and source is not None:
            learned = self._positions(source, attention_mask, past_key_values)
        hidden = self.embed(input_ids, learned, inputs_embeds)
        inputs = self.layer_inputs(hidden, position_ids, attention_mask, past_key_values, kwargs, weights)
        hidden = self.norm(self.run_layers(hidden, inputs=inputs, record=record))
        states = None if record is None else (*record, hidden)
        return BaseModelOutputWithPast(hidden, past_key_values, states, None if weights is None else tuple(weights))


class ArgonneForCausalLM(ArgonnePreTrainedModel, GenerationMixin):
    """The language model. A loss is the mean over the targets, their sum / `num_items_in_batch` where that is given, or
    their sum with `loss_reduction="sum"`; -100 = no target. Three ways to call it:

    - `labels`: the inputs, the shift happens inside. Returns logits too.
    - `shift_labels`: shift_labels[t] is the target of position t. Given beside `labels` it holds and they do not; alone
      it never makes all logits, and returns none.
    - neither: logits only.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # type: ignore[dict-item]  # noqa: RUF012

    def __init__(self, config: ArgonneConfig) -> None:
        super().__init__(config)
        self.model = ArgonneBaseModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def configure_training(
        self,
        attention: str = "auto",
        activation_checkpointing: str = "none",
        checkpointing_stride: int = 2,
        loss: str = "chunked",
        loss_chunk: int = 0,
        z_loss: float = 0.0,
    ) -> None:
        """Choose how a training run computes. Raises ValueError for an unknown choice; a forced kernel is checked when
        it first runs.
        """
        known = {
            "attention": (attention, ("auto", *ORDER)),
            "activation_checkpointing": (activation_checkpointing, ("none", "every_nth", "full")),
            "loss": (loss, ("full", "chunked")),
        }
        for name, (value, choices) in known.items():
            if value not in choices:
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(choices)}")
        if checkpointing_stride < 1 or loss_chunk < 0:
            raise ValueError(
                f"checkpointing_stride is {checkpointing_stride} and loss_chunk {loss_chunk}; expected at least 1 and 0"
            )
        self.model.training_options = TrainingOptions(
            activation_checkpointing, checkpointing_stride, loss, loss_chunk, z_loss
        )
        for layer in self._attentions():
            layer.attention_kernel = attention

    def _attentions(self) -> Iterable[ArgonneAttention]:
        return (module for module in self.modules() if isinstance(module, ArgonneAttention))

    def attention_paths(self) -> list[str]:
        """The attention path that each layer really took last, or "not run yet"."""
        return [layer.attention_path for layer in self._attentions()]

    def embed(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        return self.model.embed(input_ids, position_ids)

    def run_layers(
        self, hidden: Tensor, start: int = 0, stop: int | None = None, *, position_ids: Tensor | None = None
    ) -> Tensor:
        return self.model.run_layers(hidden, start, stop, position_ids=position_ids)

    @property
    def head(self) -> Head:
        """Weight and loss settings of the head, for an objective."""
        options = self.model.training_options
        softcap, onednn = self.config.final_logit_softcapping, getattr(self.lm_head, "onednn", False)
        settings = LossOptions(softcap, options.z_loss, options.loss_chunk, onednn=onednn)
        return Head(self.lm_head.weight, settings, whole=options.loss == "full")

    def head_loss(self, hidden: Tensor, shift_labels: Tensor) -> Tensor:
        """Sum of the token losses from what the last layer returned: final norm, head, cross-entropy. What a last
        pipeline stage runs.
        """
        return self.head.summed_loss(self.model.norm(hidden), shift_labels)

    def logits(self, normed: Tensor) -> Tensor:
        """Head and softcap on normalised hidden states."""
        logits: Tensor = self.lm_head(normed)
        cap = self.config.final_logit_softcapping
        return torch.tanh(logits / cap) * cap if cap else logits

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        loss_reduction: str = "mean",
        num_items_in_batch: int | Tensor | None = None,
        return_token_log_probs: bool = False,
        objective: Callable[[Head, Tensor], Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """An ArgonneOutput, or a tuple with `return_dict=False`; see the class. `return_token_log_probs` (with
        shift_labels) adds `token_log_probs` (B, T) fp32, differentiable, 0 where -100. `objective` gets the head and
        the final hidden states (B, T, H), and what it returns is returned: so that a wrapper around the model (DDP,
        FSDP2) sees one forward pass, whatever the loss.
        """
        if loss_reduction not in ("sum", "mean"):
            raise ValueError(f"loss_reduction is {loss_reduction!r}; expected sum or mean")
        base = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        hidden, logits, loss, log_probs = base.last_hidden_state, None, None, None
        if objective is not None:
            return objective(self.head, hidden)
        if num_items_in_batch is None and loss_reduction == "sum":
            num_items_in_batch = 1
        if labels is not None or shift_labels is None:
            # The last n positions, all for 0, or those of an index tensor.
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.logits(hidden[:, kept])
        if logits is not None and labels is not None:
            more = {"vocab_size": self.config.vocab_size, "num_items_in_batch": num_items_in_batch}
            loss = self.loss_function(logits=logits, labels=labels, shift_labels=shift_labels, **more)
        elif shift_labels is not None:
            loss, log_probs = self._own_loss(hidden, shift_labels, return_token_log_probs)
            if num_items_in_batch is None:
                num_items_in_batch = (shift_labels != IGNORED).sum().clamp_min(1)
            loss = loss / torch.as_tensor(num_items_in_batch, device=loss.device)
        return ArgonneOutput(loss, logits, base.past_key_values, base.hidden_states, base.attentions, log_probs)

    def _own_loss(self, hidden: Tensor, targets: Tensor, log_probs: bool) -> tuple[Tensor, Tensor | None]:
        """Sum of the token losses without holding all logits, and the log-probabilities where they are wanted."""
        head = self.head
        if head.weight.device.type == "meta" != hidden.device.type:
            raise ValueError(
                "lm_head is offloaded, and its weight is here only while it is called itself: pass labels instead of "
                "shift_labels, or both, or keep lm_head on a device"
            )
        hidden, targets = (x.to(head.weight.device) for x in (hidden, targets))
        if not log_probs:
            return head.summed_loss(hidden, targets), None
        found, log_z = head.token_log_probs(hidden, targets)
        return head.z_loss * log_z.square().sum() - found.sum(), found


@dataclass
class ArgonneOutput(CausalLMOutputWithPast):
    """transformers' output, and the log-probability of each target, (B, T), where it was asked for."""

    token_log_probs: Tensor | None = None


class ArgonneForSequenceClassification(GenericForSequenceClassification, ArgonnePreTrainedModel):
    """A score for each text, read at its last token that is no padding: reward models, classifiers.

    The base model is made here: transformers would look for it among the classes registered in this process.
    """

    base_class: type[ArgonneBaseModel] = ArgonneBaseModel

    def __init__(self, config: ArgonneConfig) -> None:
        ArgonnePreTrainedModel.__init__(self, config)
        self.num_labels = len(config.id2label or {})
        self.model = self.base_class(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()


class Argonne1BaseModel(ArgonneBaseModel):
    """The same under 1.x's config class: transformers' Auto classes want a model class of its own for each config
    class.
    """

    config_class = Argonne1Config


class Argonne1ForCausalLM(ArgonneForCausalLM):
    """See Argonne1BaseModel."""

    config_class = Argonne1Config


class Argonne1ForSequenceClassification(ArgonneForSequenceClassification):
    """See Argonne1BaseModel."""

    config_class = Argonne1Config
    base_class = Argonne1BaseModel


ArgonneModel = ArgonneForCausalLM  # the name under which the family published its causal LM
