"""The modules of a Qwen3 model: MLX's names and shapes for them, and where published checkpoints keep their tensors."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, overload

from mlxqwen.files.checkpoint import TensorInfo
from mlxqwen.files.config import ModelConfig

__all__ = ["Kind", "Module", "Part", "Parts", "PartsByPrefix", "modules", "parts_of"]

Kind = Literal["embeddings", "attention", "mlp", "router", "experts", "lm_head", "norms"]

# The tensors of one matrix, by the last word of their names: "weight", "weight_scale_inv", "qweight", "scales", …
Part = Mapping[str, TensorInfo]


@dataclass(frozen=True, slots=True)
class Module:
    """One module that has weights.

    Args:
        path: MLX's name for it, such as `model.layers.0.mlp.switch_mlp.up_proj`.
        kind: what it is for.
        shape: of its weight: `(n,)` for a norm, `(out, in)`, or `(experts, out, in)`.
    """

    path: str
    kind: Kind
    shape: tuple[int, ...]

    @property
    def is_matrix(self) -> bool:
        """Whether it can be quantized."""
        return self.kind != "norms"

    @property
    def rows(self) -> int:
        """Rows of one matrix."""
        return self.shape[-2] if self.is_matrix else 1

    @property
    def width(self) -> int:
        """Elements of a row."""
        return self.shape[-1]

    @property
    def count(self) -> int:
        """How many matrices it stacks."""
        return self.shape[0] if len(self.shape) == 3 else 1

    @property
    def parameters(self) -> int:
        """Weights in all."""
        return self.count * self.rows * self.width


class PartsByPrefix(MutableMapping[str, Part]):
    """A checkpoint's tensors by all but the last word of their names, then by that word.

    Each is a tuple until it is asked for: a dict for each of a hundred thousand would take more than the tensors do.
    """

    def __init__(self, tensors: Iterable[TensorInfo]) -> None:
        self._tensors: dict[str, tuple[TensorInfo, ...]] = {}
        for info in tensors:
            prefix = info.name.rpartition(".")[0]
            self._tensors[prefix] = (*self._tensors.get(prefix, ()), info)

    def __getitem__(self, prefix: str) -> Part:
        return {info.name.rpartition(".")[2]: info for info in self._tensors[prefix]}

    def __setitem__(self, prefix: str, part: Part) -> None:
        self._tensors[prefix] = tuple(part.values())

    def __delitem__(self, prefix: str) -> None:
        del self._tensors[prefix]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class Parts(Sequence[Part]):
    """The parts of one module.

    A large mixture of experts has tens of thousands of tensors. Those of one module differ in nothing but the number
    of the expert and their places, so only these are remembered.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        first = parts[0]
        self._first = first
        self._count = len(parts)
        self._places: dict[str, tuple[tuple[Path, ...], array[int]]] = {}
        self._plain: tuple[Part, ...] | None = None
        if any(_kinds(part) != _kinds(first) for part in parts):
            self._plain = tuple(parts)
            return
        for word in first:
            infos = [part[word] for part in parts]
            self._places[word] = (tuple(info.path for info in infos), array("Q", (info.start for info in infos)))

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Part: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Part]: ...
    def __getitem__(self, index: int | slice) -> Part | Sequence[Part]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(index)
        if self._plain is not None:
            return self._plain[index]
        return {word: self._info(word, index % self._count) for word in self._first}

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        if self._plain is not None:
            return sum(info.nbytes for part in self._plain for info in part.values())
        return self._count * sum(info.nbytes for info in self._first.values())

    @property
    def paths(self) -> set[Path]:
        """The files that hold them."""
        if self._plain is not None:
            return {info.path for part in self._plain for info in part.values()}
        return {path for paths, _ in self._places.values() for path in paths}

    def _info(self, word: str, index: int) -> TensorInfo:
        info = self._first[word]
        paths, starts = self._places[word]
        name = info.name.replace(".experts.0.", f".experts.{index}.")
        if name.endswith("[0]"):
            name = f"{name[:-2]}{index}]"
        return info._replace(name=name, path=paths[index], start=starts[index], stop=starts[index] + info.nbytes)


def _kinds(part: Part) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(word, info.dtype, info.shape) for word, info in part.items()]


def modules(config: ModelConfig) -> Iterator[Module]:
    """All modules that a model of this config has, from the embeddings to the head."""
    c = config
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    yield Module("model.embed_tokens", "embeddings", (c.vocab_size, c.hidden_size))
    for layer in range(c.num_hidden_layers):
        at = f"model.layers.{layer}"
        yield Module(f"{at}.input_layernorm", "norms", (c.hidden_size,))
        yield Module(f"{at}.self_attn.q_proj", "attention", (queries, c.hidden_size))
        yield Module(f"{at}.self_attn.k_proj", "attention", (keys, c.hidden_size))
        yield Module(f"{at}.self_attn.v_proj", "attention", (keys, c.hidden_size))
        yield Module(f"{at}.self_attn.o_proj", "attention", (c.hidden_size, queries))
        yield Module(f"{at}.self_attn.q_norm", "norms", (c.head_dim,))
        yield Module(f"{at}.self_attn.k_norm", "norms", (c.head_dim,))
        yield Module(f"{at}.post_attention_layernorm", "norms", (c.hidden_size,))
        yield from _feed_forward(c, layer, f"{at}.mlp")
    yield Module("model.norm", "norms", (c.hidden_size,))
    if not c.tie_word_embeddings:
        yield Module("lm_head", "lm_head", (c.vocab_size, c.hidden_size))


def _feed_forward(c: ModelConfig, layer: int, at: str) -> Iterator[Module]:
    if c.moe is None or not c.moe.routes(layer):
        for name in ("gate_proj", "up_proj"):
            yield Module(f"{at}.{name}", "mlp", (c.intermediate_size, c.hidden_size))
        yield Module(f"{at}.down_proj", "mlp", (c.hidden_size, c.intermediate_size))
        return
    experts, inner = c.moe.num_experts, c.moe.moe_intermediate_size
    yield Module(f"{at}.gate", "router", (experts, c.hidden_size))
    for name in ("gate_proj", "up_proj"):
        yield Module(f"{at}.switch_mlp.{name}", "experts", (experts, inner, c.hidden_size))
    yield Module(f"{at}.switch_mlp.down_proj", "experts", (experts, c.hidden_size, inner))


def parts_of(module: Module, by_prefix: MutableMapping[str, Part]) -> Sequence[Part]:
    """The tensors that make up a module, one part for each matrix in it; parts that are missing are empty.

    Experts are found in all three layouts: one by one as Qwen publishes them, fused as transformers 5 holds them
    (`experts.gate_up_proj`, `[experts, 2 * out, in]`), or stacked as in MLX's folders. A part of a larger tensor is
    described as if it were a tensor of its own.

    Args:
        module: what to look for.
        by_prefix: see `PartsByPrefix`. What was found is taken out, so that what is left in the end has no place in
            the model.
    """
    if module.kind != "experts":
        return (by_prefix.pop(module.path, {}),)
    block, _, projection = module.path.rpartition(".switch_mlp.")
    stacked = by_prefix.pop(module.path, None)
    if stacked is not None:
        return tuple({word: _slice(info, e, module) for word, info in stacked.items()} for e in range(module.count))
    fused = by_prefix.get(f"{block}.experts", {})
    if "gate_up_proj" in fused or "down_proj" in fused:
        if projection == "down_proj":  # the last of the three
            rest = {word: info for word, info in fused.items() if word not in ("gate_up_proj", "down_proj")}
            by_prefix.pop(f"{block}.experts")
            by_prefix.update({f"{block}.experts": rest} if rest else {})
        return _fused(module, projection, fused)
    return tuple(by_prefix.pop(f"{block}.experts.{expert}.{projection}", {}) for expert in range(module.count))


def _slice(info: TensorInfo, index: int, module: Module) -> TensorInfo:
    """Element `index` of a tensor's first axis."""
    if not info.shape or info.shape[0] != module.count:
        return info  # of no use as it is; whoever checks its shape says so
    size = info.nbytes // module.count
    start = info.start + index * size
    return info._replace(name=f"{info.name}[{index}]", shape=info.shape[1:], start=start, stop=start + size)


def _fused(module: Module, projection: str, fused: Part) -> tuple[Part, ...]:
    word = "down_proj" if projection == "down_proj" else "gate_up_proj"
    if word not in fused:
        return ({},) * module.count
    parts: list[Part] = []
    for expert in range(module.count):
        info = _slice(fused[word], expert, module)
        if projection != "down_proj" and len(info.shape) == 2 and info.shape[0] % 2 == 0:
            half = info.nbytes // 2
            start = info.start + (half if projection == "up_proj" else 0)
            info = info._replace(shape=(info.shape[0] // 2, info.shape[1]), start=start, stop=start + half)
        parts.append({"weight": info})
    return tuple(parts)
