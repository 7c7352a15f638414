"""Argonne language models, all generations in one class, for training and for the Hugging Face Hub. Ships with each
checkpoint.

Needs torch, transformers and the sibling files, nothing else. Module names are fixed: exports, parallel plans and
engines read them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .attention import IMPLEMENTATION, LayerInputs, attention_patterns
from .configuration_argonne import Argonne1Config, ArgonneConfig
from .kernels import ORDER
from .layers import ArgonneAttention, ArgonneDecoderLayer, ArgonneRotaryEmbedding, make_norm
from .loss import IGNORED, Head, LossOptions


@dataclass(frozen=True)
class TrainingOptions:
    """Switches of a training run: how, never what. They are no config fields and are not saved."""

    activation_checkpointing: str = "none"
    checkpointing_stride: int = 2
    loss: str = "chunked"
    loss_chunk: int = 0
    z_loss: float = 0.0

    def recomputes(self, layer: int) -> bool:
        """Is this layer run again in the backward pass instead of keeping its activations?"""
        nth = self.activation_checkpointing == "every_nth" and layer % self.checkpointing_stride == 0
        return nth or self.activation_checkpointing == "full"


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
        if config._attn_implementation is None:
            config._attn_implementation = IMPLEMENTATION
        super().__init__(config, *inputs, **kwargs)


class ArgonneBaseModel(ArgonnePreTrainedModel):
    """Token ids to hidden states."""

    def __init__(self, config: ArgonneConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.position_embedding == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        else:
            self.rotary_emb = ArgonneRotaryEmbedding(config)
        self.layers = nn.ModuleList(ArgonneDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = make_norm(config, config.hidden_size)
        self.gradient_checkpointing = False
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
            # Where the positions lie on a GPU their largest would cost a wait: there the length is all that is looked
            # at.
            last = (
                int(position_ids.max())
                if position_ids.device.type == "cpu" and position_ids.numel()
                else hidden.shape[1] - 1
            )
            last = max(last, hidden.shape[1] - 1)
            if last >= self.config.max_position_embeddings:
                raise ValueError(
                    f"position {last} is beyond the table of learned positions: max_position_embeddings is "
                    f"{self.config.max_position_embeddings}; shorten the text"
                )
            hidden = hidden + self.embed_positions(position_ids.to(hidden.device, non_blocking=True))
        if self.training and self.config.hidden_dropout:
            hidden = F.dropout(hidden, self.config.hidden_dropout)
        return hidden

    def layer_inputs(
        self,
        hidden: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Any = None,
        cache: Cache | None = None,
        extra: dict[str, Any] | None = None,
    ) -> LayerInputs:
        """Positions and masks for one forward pass. Explicit position_ids that restart mark the documents of a packed
        row.

        They may lie on the CPU while the model is on a GPU: then nothing here waits for the GPU.
        """
        explicit = position_ids is not None
        positions = self._positions(hidden, attention_mask, cache) if position_ids is None else position_ids
        masks = attention_patterns(self.config, hidden, attention_mask, positions, cache, explicit)
        there = positions.to(hidden.device, non_blocking=True)
        cos, sin = self.rotary_emb(there, hidden.dtype) if self.config.position_embedding == "rope" else (None, None)
        return LayerInputs(cos, sin, masks, cache, extra or {})

    @staticmethod
    def _positions(hidden: Tensor, attention_mask: Any, cache: Cache | None) -> Tensor:
        """0, 1, 2... after what the cache holds; with a 2-D mask they count real tokens only, so that left padding
        shifts nothing.
        """
        length = hidden.shape[1]
        if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
            return (attention_mask.to(torch.int64).cumsum(-1) - 1).clamp_min(0)[:, -length:].to(hidden.device)
        past = 0 if cache is None else int(cache.get_seq_length())
        return torch.arange(past, past + length, device=hidden.device)[None]

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
            if (
                self.training
                and torch.is_grad_enabled()
                and (self.gradient_checkpointing or self.training_options.recomputes(index))
            ):
                hidden = checkpoint(self.layers[index], hidden, inputs, use_reentrant=False)
            else:
                hidden = self.layers[index](hidden, inputs)
        return hidden

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Hidden states (B, T, H) after the final norm. Further keyword arguments reach the attention function of each
        layer.
        """
        if kwargs.pop("output_attentions", None):
            raise ValueError("output_attentions is not supported: no attention path here keeps its weights")
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        record: list[Tensor] | None = [] if (output_hidden_states or self.config.output_hidden_states) else None
        learned, source = position_ids, input_ids if inputs_embeds is None else inputs_embeds
        if self.config.position_embedding == "learned" and position_ids is None and source is not None:
            learned = self._positions(source, attention_mask, past_key_values)
        hidden = self.embed(input_ids, learned, inputs_embeds)
        inputs = self.layer_inputs(hidden, position_ids, attention_mask, past_key_values, kwargs)
        hidden = self.norm(self.run_layers(hidden, inputs=inputs, record=record))
        output = BaseModelOutputWithPast(hidden, past_key_values, None if record is None else (*record, hidden))
        return output if return_dict is None or return_dict else output.to_tuple()


class ArgonneForCausalLM(ArgonnePreTrainedModel, GenerationMixin):
    """The language model. Three ways to call it for a loss:

    - `shift_labels` (this project): labels[t] is the target of position t, -100 = none. Returns the SUM of the token
      losses and no logits.
    - `labels` (Hugging Face): labels are the inputs, the shift happens inside; the mean, or sum / num_items_in_batch.
      Returns logits too.
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
        settings = LossOptions(self.config.final_logit_softcapping, options.z_loss, options.loss_chunk)
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
        return logits if cap is None else torch.tanh(logits / cap) * cap

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
        loss_reduction: str = "sum",
        num_items_in_batch: int | Tensor | None = None,
        return_token_log_probs: bool = False,
        return_dict: bool | None = None,
        objective: Callable[[Head, Tensor], Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """An ArgonneOutput, or a tuple without `return_dict`; see the class. `return_token_log_probs` (with
        shift_labels) adds `token_log_probs` (B, T) fp32, differentiable, 0 where -100. `objective` gets the head and
        the final hidden states (B, T, H), and what it returns is returned: so that a wrapper around the model (DDP,
        FSDP2) sees one forward pass, whatever the loss.
        """
        if labels is not None and shift_labels is not None:
            raise ValueError("labels and shift_labels were both given: only labels are shifted inside; give one")
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
        if objective is not None:
            return objective(self.head, base.last_hidden_state)
        output = ArgonneOutput(past_key_values=base.past_key_values, hidden_states=base.hidden_states)
        if shift_labels is None:
            # The last n positions, all for 0, or those of an index tensor.
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            output.logits = self.logits(base.last_hidden_state[:, kept])
            if labels is not None:
                more = {"vocab_size": self.config.vocab_size, "num_items_in_batch": num_items_in_batch}
                output.loss = self.loss_function(logits=output.logits, labels=labels, **more)
            return output if return_dict is None or return_dict else output.to_tuple()
        if return_token_log_probs:
            output.token_log_probs, log_z = self.head.token_log_probs(base.last_hidden_state, shift_labels)
            loss = self.head.z_loss * log_z.square().sum() - output.token_log_probs.sum()
        else:
            loss = self.head.summed_loss(base.last_hidden_state, shift_labels)
        if num_items_in_batch is not None:
            loss = loss / num_items_in_batch
        elif loss_reduction == "mean":
            loss = loss / (shift_labels != IGNORED).sum().clamp_min(1)
        output.loss = loss
        return output if return_dict is None or return_dict else output.to_tuple()


@dataclass
class ArgonneOutput(CausalLMOutputWithPast):
    """transformers' output, and the log-probability of each target, (B, T), where it was asked for."""

    token_log_probs: Tensor | None = None


class Argonne1BaseModel(ArgonneBaseModel):
    """The same under 1.x's config class: transformers' Auto classes want a model class of its own for each config
    class.
    """

    config_class = Argonne1Config


class Argonne1ForCausalLM(ArgonneForCausalLM):
    """See Argonne1BaseModel."""

    config_class = Argonne1Config


ArgonneModel = ArgonneForCausalLM  # the name under which the family published its causal LM
