"""One configuration for every Argonne generation. Ships with each checkpoint: imports nothing but transformers."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

from transformers import PreTrainedConfig

FULL, SLIDING = "full_attention", "sliding_attention"
_UNSET: Any = None

# Names of earlier releases; a modern name that is given always wins.
_ALIASES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "block_size": "max_position_embeddings",
    "logit_softcap": "final_logit_softcapping",
}
# Training switches and unused fields of earlier configs: no architecture, so they are not carried along.
_NOT_ARCHITECTURE = (
    *("use_flash_attention", "use_flash_attn", "use_gradient_checkpointing"),
    *("z_loss_weight", "mtp_horizon", "mtp_loss_weight", "loss_chunk_size"),
)
# Settings of each rope_type beside rope_theta, as transformers names them: those that must be there, those that may.
_ROPE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "yarn": (
        ("factor",),
        (
            *("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
            *("mscale", "mscale_all_dim", "truncate"),
        ),
    ),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
}


class ArgonneConfig(PreTrainedConfig):
    """Architecture of an Argonne model, 2.0 and later (`model_type` argonne2).

    Every field that tells the generations apart is explicit; one that a config lacks reads as off. Configs of earlier
    releases parse: old names map to new ones and never override them. `head_dim` is free: `hidden_size` need not equal
    heads x head_dim. `sliding_window = W` lets query i see the W keys i-W+1 .. i on the layers whose `layer_types`
    entry is `sliding_attention`.

    Raises ValueError when the fields contradict each other.
    """

    model_type = "argonne2"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    base_model_tp_plan: ClassVar[dict[str, Any] | None] = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan: ClassVar[Any] = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 151_669
    hidden_size: int = _UNSET  # 1,792
    num_hidden_layers: int = _UNSET  # 28
    num_attention_heads: int = _UNSET  # 14
    num_key_value_heads: int = _UNSET  # as many as query heads
    head_dim: int = _UNSET  # hidden_size // num_attention_heads
    intermediate_size: int = _UNSET  # 8/3 hidden_size, rounded up to a multiple of 256
    max_position_embeddings: int = _UNSET  # 1,024
    position_embedding: str = "rope"
    rope_parameters: dict[str, Any] | None = None
    norm_type: str = "rms"
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    mlp_gated: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    tie_word_embeddings: bool = True
    q_norm: bool = False
    k_norm: bool = False
    v_norm: bool = False
    sandwich_norm: bool = False
    layer_types: list[str] | None = None
    sliding_window: int | None = None
    final_logit_softcapping: float | None = None
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    _sizes: ClassVar[dict[str, int]] = {
        "hidden_size": 1_792,
        "num_hidden_layers": 28,
        "num_attention_heads": 14,
        "max_position_embeddings": 1_024,
    }

    def __post_init__(self, **kwargs: Any) -> None:
        self._read_earlier_names(kwargs)
        self._check_types()
        for name, default in self._sizes.items():
            if getattr(self, name) is None:
                setattr(self, name, default)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // max(1, self.num_attention_heads)
        if self.intermediate_size is None:
            self.intermediate_size = (
                -(-int(8 * self.hidden_size / 3) // 256) * 256 if self.mlp_gated else 4 * self.hidden_size
            )
        # No layer_types means full attention: earlier configs advertise a window that no released weights were trained
        # with.
        advertised = kwargs.pop("local_attention_window", None) or self.sliding_window
        interleaved = kwargs.pop("interleaved_local_attention", True)
        if self.layer_types is None:
            if advertised and interleaved:
                warnings.warn(
                    f"this config names a window of {advertised} but no layer_types: read as full attention on every "
                    "layer, as released weights were trained (`argonne import --attention as-config` keeps the window)",
                    stacklevel=2,
                )
            self.layer_types = [FULL] * self.num_hidden_layers
        self.layer_types = list(self.layer_types)
        if SLIDING not in self.layer_types:
            self.sliding_window = None
        if not self.final_logit_softcapping:
            self.final_logit_softcapping = None
        theta = (self.rope_parameters or {}).get("rope_theta")
        if theta is not None and kwargs.get("rope_scaling"):
            kwargs["rope_scaling"] = {"rope_theta": theta, **kwargs["rope_scaling"]}  # in place of all of the former
        super().__post_init__(**kwargs)
        if self.position_embedding == "learned" and self.rope_type == "default":
            self.rope_parameters = None
        self.check_architecture()

    @property
    def rope_type(self) -> str:
        """How rotary frequencies are scaled: a key of the table above, `default` = not at all."""
        rope = self.rope_parameters or {}
        return str(rope.get("rope_type", rope.get("type", "default")))

    @property
    def rope_scaling(self) -> dict[str, Any] | None:
        """The earlier name of `rope_parameters`; set under it, the base stays what it was."""
        return self.rope_parameters

    @rope_scaling.setter
    def rope_scaling(self, value: dict[str, Any] | None) -> None:
        self.rope_parameters = {"rope_theta": (self.rope_parameters or {}).get("rope_theta"), **(value or {})}

    def _read_earlier_names(self, kwargs: dict[str, Any]) -> None:
        for old, new in _ALIASES.items():
            value = kwargs.pop(old, None)
            if isinstance(value, bool) or not isinstance(value, int | float | None):
                raise ValueError(f"{old} is {value!r}; expected a number")
            if value is not None and getattr(self, new) is None:
                setattr(self, new, value)
        both = kwargs.pop("qk_norm", None)
        if not isinstance(both, bool | None):
            raise ValueError(f"qk_norm is {both!r}; expected true or false")
        if both is not None:
            self.q_norm = self.k_norm = both
        for name in _NOT_ARCHITECTURE:
            kwargs.pop(name, None)

    def _check_types(self) -> None:
        """Raise ValueError naming the first field whose value is of another type than it is declared with."""
        kinds = {"int": int, "float": int | float, "bool": bool, "str": str, "list": list | tuple, "dict": dict}
        for name, declared in ArgonneConfig.__annotations__.items():
            allowed = [word.split("[")[0] for word in str(declared).split(" | ")]
            value = getattr(self, name, None)
            if declared.startswith("ClassVar") or value is None:
                continue
            fits = [isinstance(value, kinds[word]) for word in allowed if word in kinds]
            if not any(fits) or (isinstance(value, bool) and "bool" not in allowed):
                raise ValueError(f"{name} is {value!r}; expected {declared.removesuffix(' | None')}")

    def check_architecture(self) -> None:
        """Raise ValueError naming the first field that cannot be, its value and what it must be."""
        self._check_types()
        sizes = (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
        )
        for name in (*sizes, "intermediate_size", "max_position_embeddings"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; expected a whole number from 1 on")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads is {self.num_attention_heads}, not a multiple of num_key_value_heads = "
                f"{self.num_key_value_heads}"
            )
        choices = {
            "position_embedding": ("rope", "learned"),
            "norm_type": ("rms", "layer"),
            "hidden_act": ("silu", "gelu"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(known)}")
        self.check_rope()
        assert self.layer_types is not None
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries; expected num_hidden_layers = "
                f"{self.num_hidden_layers}"
            )
        for layer, kind in enumerate(self.layer_types):
            if kind not in (FULL, SLIDING):
                raise ValueError(f"layer_types[{layer}] is {kind!r}; expected {FULL} or {SLIDING}")
        if SLIDING in self.layer_types and not (isinstance(self.sliding_window, int) and self.sliding_window >= 1):
            raise ValueError(
                f"sliding_window is {self.sliding_window!r}; a {SLIDING} layer needs a whole number of keys from 1 on"
            )
        if SLIDING not in self.layer_types and self.sliding_window is not None:
            raise ValueError(f"sliding_window is {self.sliding_window!r}, and layer_types has no {SLIDING} layer")
        for name in ("attention_dropout", "hidden_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected a number from 0 to below 1")
        if self.rms_norm_eps <= 0:
            raise ValueError(f"rms_norm_eps is {self.rms_norm_eps!r}; expected a positive number")
        if self.final_logit_softcapping is not None and self.final_logit_softcapping < 0:
            raise ValueError(
                f"final_logit_softcapping is {self.final_logit_softcapping!r}; expected a positive number, or 0 for "
                "none"
            )

    def check_rope(self) -> None:
        """The part of `check_architecture` that a forward pass repeats when `rope_parameters` were changed."""
        rope, kind = self.rope_parameters or {}, self.rope_type
        if self.position_embedding == "learned":
            if kind != "default":
                raise ValueError(f"rope_parameters.rope_type is {kind!r}; learned positions have none")
            return
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary positions need an even number")
        if kind not in _ROPE:
            raise ValueError(f"rope_parameters.rope_type is {kind!r}; expected one of {', '.join(_ROPE)}")
        needed, more = _ROPE[kind]
        for name in ("rope_theta", *needed):
            value = rope.get(name)
            if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
                raise ValueError(f"rope_parameters.{name} is {value!r}; expected a positive number")
        known = {"rope_type", "type", "rope_theta", *needed, *more}
        whole = {"partial_rotary_factor"} if rope.get("partial_rotary_factor", 1.0) == 1.0 else set()
        if unknown := sorted(set(rope) - known - whole):
            raise ValueError(
                f"rope_parameters.{unknown[0]} is {rope[unknown[0]]!r}; Argonne models know no such setting of "
                f"rope_type {kind!r}"
            )


class Argonne1Config(ArgonneConfig):
    """1.0 and 1.5 (`model_type` argonne): GPT-2-like, learned positions, LayerNorm, erf GELU, biases, untied head."""

    model_type = "argonne"
    base_model_tp_plan: ClassVar[dict[str, Any] | None] = {
        name: how for name, how in (ArgonneConfig.base_model_tp_plan or {}).items() if "gate_proj" not in name
    }

    vocab_size: int = 12_000
    position_embedding: str = "learned"
    norm_type: str = "layer"
    rms_norm_eps: float = 1e-5
    hidden_act: str = "gelu"
    mlp_gated: bool = False
    attention_bias: bool = True
    mlp_bias: bool = True
    attention_dropout: float = 0.1
    hidden_dropout: float = 0.1
    tie_word_embeddings: bool = False

    _sizes: ClassVar[dict[str, int]] = {
        "hidden_size": 1_296,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "max_position_embeddings": 2_048,
    }

    def _read_earlier_names(self, kwargs: dict[str, Any]) -> None:
        dropout = kwargs.pop("dropout", None)
        if dropout is not None:
            self.attention_dropout = self.hidden_dropout = dropout
        super()._read_earlier_names(kwargs)
