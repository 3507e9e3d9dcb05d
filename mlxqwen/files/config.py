"""`config.json` → a frozen `ModelConfig`.

Strict and bounded: every number is checked before anything is allocated by its word. Both spellings are read, the one
Qwen publishes (`rope_theta`, `rope_scaling`, `num_experts`) and the one of transformers 5 (`rope_parameters`,
`num_local_experts`). One file, as each number is a line and its message.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from reprlib import Repr
from typing import Any

from mlxqwen.errors import ConfigError, OptionError
from mlxqwen.files.json_file import json_kind, read_json_object
from mlxqwen.files.model_files import read_config_file
from mlxqwen.files.tensor_names import without_wrappers

__all__ = [
    "AffineQuantization",
    "GenerationConfig",
    "ModelConfig",
    "MoeConfig",
    "Quantization",
    "YarnScaling",
]

_AFFINE_BITS = (2, 3, 4, 5, 6, 8)
_AFFINE_GROUP_SIZES = (32, 64, 128)
_DEFAULT_BITS, _DEFAULT_GROUP_SIZE = 4, 64  # what MLX takes for null, and what mlx-lm's mixed recipes mean by it

# Qwen3 was trained on 32,768 positions; its releases declare 40,960 to leave room for a prompt of 8,192.
_DECLARED_CONTEXT = 40_960
_TRAINED_CONTEXT = 32_768

MOST_YARN_FACTOR = 1024.0
_REQUEST_FACTORS = (2.0, 4.0)  # the model cards: no larger a factor than typical texts need, and 4 was validated

# What an error shows of a value; no more of it is spelled.
_SHOWN = 80
_BRIEF = Repr()
_BRIEF.maxlevel = 4
_BRIEF.maxdict = _BRIEF.maxlist = 40
_BRIEF.maxstring = _BRIEF.maxlong = _BRIEF.maxother = 2 * _SHOWN

_ROPE_KEYS = (
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
)


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """Static YaRN, after Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models" (2023).

    `attention_factor` multiplies both rotated queries and rotated keys.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    @property
    def context(self) -> int:
        """Tokens of the extended context."""
        return int(self.factor * self.original_max_position_embeddings)


@dataclass(frozen=True, slots=True)
class MoeConfig:
    """Mixture of experts: which layers route, to how many experts, and how the weights are normalised."""

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()

    def routes(self, layer: int) -> bool:
        """Whether decoder layer `layer` (from 0) is a mixture of experts."""
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0


@dataclass(frozen=True, slots=True)
class AffineQuantization:
    """MLX's affine groups: `w = scale * code + bias`, one scale and bias for `group_size` codes of `bits` bits."""

    group_size: int
    bits: int


@dataclass(frozen=True, slots=True)
class Quantization:
    """The quantization of a whole checkpoint: a default, and what single modules do instead (None: not quantized)."""

    default: AffineQuantization
    overrides: Mapping[str, AffineQuantization | None] = field(default_factory=dict)

    def of(self, module: str) -> AffineQuantization | None:
        """How `module` (a dotted path such as `model.layers.0.mlp.gate_proj`) is quantized if it is."""
        return self.overrides.get(module, self.default)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of one Qwen3 model, in Hugging Face's names.

    `yarn_choices` are the scalings that a request may run under if it does not fit the trained context, by ascending
    factor; empty where one RoPE holds for all requests. See `with_yarn_by_request`. `notes` are lines for what its
    folder's files say and its weights do not bear out.
    """

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: YarnScaling | None = None
    tie_word_embeddings: bool = False
    moe: MoeConfig | None = None
    eos_token_ids: tuple[int, ...] = ()
    quantization: Quantization | None = None
    foreign_quantization: str | None = None
    yarn_choices: tuple[YarnScaling, ...] = ()
    architecture: str | None = None
    notes: tuple[str, ...] = field(default=(), compare=False)
    _by_yarn_factor: dict[float, ModelConfig] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def context_length(self) -> int:
        """Positions, in tokens, that the model can tell apart: its declared context, or what YaRN extends it to.

        Where requests are scaled by their length, that of the largest factor.
        """
        scaling = self.yarn_choices[-1] if self.yarn_choices else self.rope_scaling
        return self.max_position_embeddings if scaling is None else max(self.max_position_embeddings, scaling.context)

    def kv_group_size(self, group_size: int) -> int:
        """How many cached values share a scale: `group_size`, or 32 in place of a 64 that does not divide a head."""
        return 32 if group_size == 64 and self.head_dim % 64 else group_size

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Read `folder/config.json` as `read_config_file` does. Raises `ConfigError`."""
        values, notes = read_config_file(folder)
        return replace(cls.from_dict(values, source=str(folder / "config.json")), notes=notes)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], *, source: str = "config.json") -> ModelConfig:
        """Read a parsed `config.json`; `source` names it in errors. Raises `ConfigError`."""
        return _read_config(_Keys(config, source))

    def with_rope_scaling(self, rope_scaling: Mapping[str, Any]) -> ModelConfig:
        """The same model under other RoPE scaling, given as in `config.json`.

        Raises:
            OptionError: a value out of range, or a key that means nothing (`config.json` itself may hold such keys).
        """
        example = 'For example {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}.'
        if not isinstance(rope_scaling, Mapping):
            raise OptionError(f"rope_scaling: found {json_kind(rope_scaling)}, expected an object", hint=example)
        for key in rope_scaling:
            if key not in _ROPE_KEYS:
                raise OptionError(
                    f"rope_scaling: found {str(key)[:_SHOWN]!r}, expected only {', '.join(_ROPE_KEYS)}", hint=example
                )
        try:
            keys = _Keys(rope_scaling, "rope_scaling")
            theta = keys.number("rope_theta", default=self.rope_theta, low=2.0, high=1e12)
            return replace(self, rope_theta=theta, rope_scaling=_read_rope_scaling(keys, self.max_position_embeddings))
        except ConfigError as error:
            raise OptionError(error.problem, hint=example) from None

    def with_yarn(self, factor: float) -> ModelConfig:
        """The same model with its trained context extended `factor` times by YaRN.

        A model that has YaRN already keeps its ramp (`beta_fast`, `beta_slow`, `truncate`) and its trained context. The
        attention factor becomes the one that YaRN's authors recommend for the new factor, even where `config.json`
        gives another: that one was chosen for the old factor. Raises `OptionError`.
        """
        declared = self.max_position_embeddings
        scaling: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
        scaling["original_max_position_embeddings"] = _TRAINED_CONTEXT if declared == _DECLARED_CONTEXT else declared
        if (yarn := self.rope_scaling) is not None:
            scaling["original_max_position_embeddings"] = yarn.original_max_position_embeddings
            scaling |= {"beta_fast": yarn.beta_fast, "beta_slow": yarn.beta_slow, "truncate": yarn.truncate}
        return self.with_rope_scaling(scaling)

    def with_yarn_by_request(self) -> ModelConfig:
        """The same model, unscaled where a request fits its trained context, else under the least of the factors 2 and
        4 that holds it, and of that of `config.json` if it is larger. Scaling costs short texts accuracy.
        """
        own = self.rope_scaling
        factors = [*_REQUEST_FACTORS, *([own.factor] if own is not None and own.factor > _REQUEST_FACTORS[-1] else [])]
        scalings = [self.with_yarn(factor).rope_scaling for factor in factors]
        context = self.max_position_embeddings
        if own is not None and context >= own.context:  # declared as extended
            context = own.original_max_position_embeddings
        choices = tuple(scaling for scaling in scalings if scaling is not None)
        return replace(self, rope_scaling=None, yarn_choices=choices, max_position_embeddings=context)

    def yarn_factor_for(self, tokens: int) -> float:
        """The factor for a request of so many tokens: 1, unscaled, or the least of `yarn_choices` that holds them.

        The largest factor where none holds them: a reply ends with the context.
        """
        if not self.yarn_choices or tokens <= self.yarn_choices[0].original_max_position_embeddings:
            return 1.0
        holding = [scaling.factor for scaling in self.yarn_choices if tokens <= scaling.context]
        return holding[0] if holding else self.yarn_choices[-1].factor

    @property
    def by_yarn_factor(self) -> Mapping[float, ModelConfig]:
        """The same model as a request of each factor runs it, 1 for unscaled; empty without `yarn_choices`."""
        known = self._by_yarn_factor
        if self.yarn_choices and not known:  # made once, as each request asks for it several times
            scalings = {1.0: None, **{scaling.factor: scaling for scaling in self.yarn_choices}}
            known |= {factor: replace(self, rope_scaling=one, yarn_choices=()) for factor, one in scalings.items()}
        return known

    def at_yarn_factor(self, factor: float) -> ModelConfig:
        """One of `by_yarn_factor`. Raises `OptionError` for any other factor."""
        known = self.by_yarn_factor
        if factor not in known:
            raise OptionError(
                f"yarn_factor: found {factor!r}, expected {', '.join(f'{one:g}' for one in known) or 'none'}",
                hint="" if known else 'Only a model loaded with yarn="auto" has a factor for each request.',
            )
        return known[factor]


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """`generation_config.json`: advice, not structure, so that junk in it is left aside and never stops a model.

    `values` is the parsed file ({} if missing or unreadable); `notes` has a line for each thing that was ignored.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    eos_token_ids: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def from_folder(cls, folder: Path) -> GenerationConfig:
        """Read `folder/generation_config.json` as far as it makes sense."""
        path = folder / "generation_config.json"
        if not path.exists():
            return cls()
        try:
            values = read_json_object(path, error=ConfigError)
        except ConfigError as error:
            return cls(notes=(f"{error.problem}; ignored",))
        try:
            return cls(values, _Keys(values, str(path)).token_ids("eos_token_id"))
        except ConfigError as error:
            return cls(values, notes=(f"{error.problem}; ignored",))


class _Keys:
    """Typed, bounded access to one JSON object; errors name the file, the key, what was found and expected."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values = values
        self.source = source

    def fail(
        self, key: str, expected: str, hint: str = "Take the config.json that was written with these weights."
    ) -> ConfigError:
        name = repr(key[:_SHOWN])
        if key not in self.values:
            return ConfigError(f"{self.source}: key {name} is missing, expected {expected}", hint=hint)
        found = _BRIEF.repr(self.values[key])
        found = found if len(found) <= _SHOWN else f"{found[: _SHOWN - 1]}…"
        return ConfigError(f"{self.source}: {name} is {found}, expected {expected}", hint=hint)

    def integer(self, key: str, *, default: int | None = None, low: int = 1, high: int) -> int:
        value = self.values.get(key, default)
        if value is None and default is not None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.fail(key, f"an integer from {low:,} to {high:,}")
        return value

    def number(self, key: str, *, default: float | None = None, low: float, high: float) -> float:
        value = self.values.get(key, default)
        if value is None and default is not None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self.fail(key, f"a number from {low:g} to {high:g}")
        return float(value)

    def boolean(self, key: str, *, default: bool) -> bool:
        value = self.values.get(key, default)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(key, "true or false")
        return value

    def object(self, key: str) -> _Keys | None:
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.fail(key, "an object or null")
        return _Keys(value, f"{self.source}: {key}")

    def token_ids(self, key: str) -> tuple[int, ...]:
        value = self.values.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids) or len(ids) > 64:
            raise self.fail(key, "a token id or a list of token ids")
        return tuple(ids)

    def refuse_unless(self, key: str, allowed: tuple[Any, ...], why: str) -> None:
        if self.values.get(key, allowed[0]) not in allowed:
            raise self.fail(key, f"{allowed[0]!r}", hint=why)


def _read_config(keys: _Keys) -> ModelConfig:
    model_type = keys.values.get("model_type")
    if model_type not in ("qwen3", "qwen3_moe"):
        raise keys.fail("model_type", "'qwen3' or 'qwen3_moe'", hint="mlxqwen runs Qwen3 models only.")
    moe = model_type == "qwen3_moe"
    unused = "No Qwen3 release uses this, and mlxqwen does not run it."
    keys.refuse_unless("attention_bias", (False, None), unused)
    keys.refuse_unless("use_sliding_window", (False, None), unused)
    keys.refuse_unless("hidden_act", ("silu", None), unused)
    layer_types = keys.values.get("layer_types")
    if layer_types is not None and (
        not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types)
    ):
        raise keys.fail("layer_types", "'full_attention' for every layer", hint=unused)

    hidden_size = keys.integer("hidden_size", high=65_536)
    num_hidden_layers = keys.integer("num_hidden_layers", high=1_024)
    num_attention_heads = keys.integer("num_attention_heads", high=1_024)
    num_key_value_heads = keys.integer("num_key_value_heads", default=num_attention_heads, high=1_024)
    if num_attention_heads % num_key_value_heads:
        raise keys.fail("num_key_value_heads", f"a divisor of num_attention_heads, {num_attention_heads}")
    # transformers' own defaults: 128 for Qwen3, an even split for Qwen3-MoE
    head_dim = keys.integer("head_dim", default=hidden_size // num_attention_heads if moe else 128, low=2, high=1_024)
    if head_dim % 2:
        raise keys.fail("head_dim", "an even number, since RoPE rotates pairs")
    max_position_embeddings = keys.integer("max_position_embeddings", high=1 << 27)
    rope_theta, rope_scaling = _read_rope(keys, max_position_embeddings)
    quantization, foreign = _read_quantization(keys)
    architectures = keys.values.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else None

    return ModelConfig(
        model_type=model_type,
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=head_dim,
        intermediate_size=keys.integer("intermediate_size", high=1 << 20),
        vocab_size=keys.integer("vocab_size", high=1 << 22),
        max_position_embeddings=max_position_embeddings,
        rms_norm_eps=keys.number("rms_norm_eps", low=1e-12, high=1e-1),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tie_word_embeddings=keys.boolean("tie_word_embeddings", default=False),
        moe=_read_moe(keys, num_hidden_layers) if moe else None,
        eos_token_ids=keys.token_ids("eos_token_id"),
        quantization=quantization,
        foreign_quantization=foreign,
        architecture=architecture[:_SHOWN] if isinstance(architecture, str) else None,
    )


def _read_moe(keys: _Keys, num_hidden_layers: int) -> MoeConfig:
    spelling = "num_experts" if keys.values.get("num_local_experts") is None else "num_local_experts"
    num_experts = keys.integer(spelling, high=4_096)
    mlp_only_layers = keys.values.get("mlp_only_layers")
    mlp_only_layers = [] if mlp_only_layers is None else mlp_only_layers
    if not isinstance(mlp_only_layers, list) or any(
        isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < num_hidden_layers
        for layer in mlp_only_layers
    ):
        raise keys.fail("mlp_only_layers", f"a list of layers from 0 to {num_hidden_layers - 1}")
    return MoeConfig(
        num_experts=num_experts,
        num_experts_per_tok=keys.integer("num_experts_per_tok", high=num_experts),
        moe_intermediate_size=keys.integer("moe_intermediate_size", high=1 << 20),
        norm_topk_prob=keys.boolean("norm_topk_prob", default=False),
        decoder_sparse_step=keys.integer("decoder_sparse_step", default=1, high=1_024),
        mlp_only_layers=tuple(mlp_only_layers),
    )


def _read_rope(keys: _Keys, max_position_embeddings: int) -> tuple[float, YarnScaling | None]:
    """RoPE's base and scaling from either spelling; as in transformers 5, a base inside the object wins."""
    objects = [found for key in ("rope_scaling", "rope_parameters") if (found := keys.object(key)) and found.values]
    scaling = _read_rope_scaling(objects[0], max_position_embeddings) if objects else None
    owner = next((found for found in objects if found.values.get("rope_theta") is not None), keys)
    return owner.number("rope_theta", low=2.0, high=1e12), scaling


def _read_rope_scaling(keys: _Keys, max_position_embeddings: int) -> YarnScaling | None:
    """RoPE scaling under either name of its type; the meaning of every key is that of transformers."""
    type_key = next((key for key in ("rope_type", "type") if keys.values.get(key) is not None), "rope_type")
    rope_type = keys.values.get(type_key)
    if rope_type == "default" or (rope_type is None and keys.values.get("factor") is None):
        return None
    if rope_type != "yarn":
        raise keys.fail(type_key, "'yarn' or 'default'", hint="YaRN is the scaling that Qwen3 was validated with.")
    factor = keys.number("factor", low=1.0, high=MOST_YARN_FACTOR)
    original = keys.integer("original_max_position_embeddings", default=max_position_embeddings, high=1 << 27)
    beta_fast = _read_beta(keys, "beta_fast", 32.0)
    beta_slow = _read_beta(keys, "beta_slow", 1.0)
    if beta_fast < beta_slow:
        raise keys.fail("beta_fast", f"at least beta_slow, {beta_slow:g}")
    mscale = keys.number("mscale", default=0.0, low=0.0, high=100.0)
    mscale_all_dim = keys.number("mscale_all_dim", default=0.0, low=0.0, high=100.0)
    inferred = _yarn_mscale(factor, 1.0)
    if mscale and mscale_all_dim:
        inferred = _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all_dim)
    return YarnScaling(
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=keys.number("attention_factor", default=inferred, low=1e-3, high=100.0),
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        truncate=keys.boolean("truncate", default=True),
    )


def _read_beta(keys: _Keys, key: str, default: float) -> float:
    value = keys.values.get(key)
    if isinstance(value, int | float) and value == 0:  # to transformers, 0 is no value
        return default
    return keys.number(key, default=default, low=1e-3, high=1e6)


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def _read_quantization(keys: _Keys) -> tuple[Quantization | None, str | None]:
    """MLX's own quantization, or the name of another format that the checkpoint declares."""
    mlx, declared = keys.object("quantization"), keys.object("quantization_config")
    section = mlx or declared
    if section is None:
        return None, None
    if mlx is None and "quant_method" in section.values:
        method = section.values["quant_method"]
        return None, (method if isinstance(method, str) else _BRIEF.repr(method))[:40]
    if section.values.get("mode") not in (None, "affine"):
        raise section.fail("mode", "'affine'", hint="Only MLX's affine quantization is run; convert from the original.")
    overrides: dict[str, AffineQuantization | None] = {}
    for name, value in section.values.items():
        if value is False:
            overrides[without_wrappers(name)] = None
        elif isinstance(value, Mapping):
            module = _Keys(value, f"{section.source}: {name[:_SHOWN]}")
            if module.values.get("mode") not in (None, "affine"):
                raise module.fail("mode", "'affine'")
            overrides[without_wrappers(name)] = _read_affine(module)
        elif ("." in name or name == "lm_head") and value is not True:  # the rest is said of the whole checkpoint
            raise section.fail(name, "an object, true or false")
    return Quantization(_read_affine(section), overrides), None


def _read_affine(keys: _Keys) -> AffineQuantization:
    bits, group_size = (keys.values.get(key) for key in ("bits", "group_size"))
    bits = _DEFAULT_BITS if bits is None else bits
    group_size = _DEFAULT_GROUP_SIZE if group_size is None else group_size
    if bits not in _AFFINE_BITS or isinstance(bits, bool):
        raise keys.fail("bits", f"one of {', '.join(map(str, _AFFINE_BITS))}")
    if group_size not in _AFFINE_GROUP_SIZES or isinstance(group_size, bool):
        raise keys.fail("group_size", f"one of {', '.join(map(str, _AFFINE_GROUP_SIZES))}")
    return AffineQuantization(int(group_size), int(bits))
