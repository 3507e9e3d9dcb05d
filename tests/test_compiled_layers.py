"""What is compiled once for all modules of one form, and what a form is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxqwen.cache import make_cache
from mlxqwen.device import Device
from mlxqwen.files.config import ModelConfig
from mlxqwen.model.compiled import CompiledByForm, form_of
from mlxqwen.model.mlp import MLP
from mlxqwen.model.qwen3 import CompiledDecoder, DecoderLayer, Qwen3ForCausalLM
from mlxqwen.model.watched import RMSNorm, WatchedModule
from tests.tiny_checkpoints import DENSE, GOLDEN_MODELS, Config

CPU = Device("a CPU", is_gpu=False, memory=1 << 34, usable_memory=1 << 34)
X = mx.random.normal((3, 4), key=mx.random.key(0))


class Beside(nn.Module):
    """A matrix of its own beside a child, and a setting; nothing elementwise, for which a CPU starts a compiler."""

    def __init__(self, child: nn.Module, width: int = 2) -> None:
        super().__init__()
        self.child, self.width = child, width
        self.own = mx.random.normal((4, 4), key=mx.random.key(7))

    def __call__(self, x: mx.array) -> mx.array:
        return (self.child(x) @ self.own)[:, : self.width]


class Pair(WatchedModule):
    """Two children, one after the other; `width` is a setting."""

    def __init__(self, width: Any = 3) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.width = width

    def __call__(self, x: mx.array) -> mx.array:
        return self["two"](self["one"](x))[:, : self.width]


traces: list[nn.Module] = []


@pytest.fixture(autouse=True)
def _none_is_traced() -> None:
    traces.clear()


def make(module: nn.Module) -> Callable[[mx.array], mx.array]:
    """The function that is compiled. It runs when it is traced."""

    def run(x: mx.array) -> mx.array:
        traces.append(module)
        result: mx.array = module(x)
        return result

    return run


def compiled(by_form: CompiledByForm, module: nn.Module) -> Callable[[mx.array], mx.array]:
    """It, with all arrays of the module."""
    return by_form.compile(make, [module], [module])


def test_modules_of_one_form_share_a_trace() -> None:
    by_form, pairs = CompiledByForm(), [Pair() for _ in range(5)]
    functions = [compiled(by_form, pair) for pair in pairs]
    for _ in range(2):
        for pair, function in zip(pairs, functions, strict=True):
            assert mx.array_equal(function(X), pair(X))
    assert len(traces) == 1
    assert not mx.array_equal(functions[0](X), functions[1](X))


def test_modules_of_other_forms_have_their_own() -> None:
    by_form, pairs = CompiledByForm(), [Pair(3), Pair(2), Pair(3), Beside(Pair(4), 3), Beside(Pair(4), 1)]
    pairs[2].one = Beside(nn.Linear(4, 4, bias=False), 4)
    for pair in pairs:
        assert mx.array_equal(compiled(by_form, pair)(X), pair(X))
    assert traces == pairs


def set_weights(pair: Pair, **weights: mx.array) -> None:
    for name, weight in weights.items():
        pair[name].weight = weight


CHANGES: dict[str, Callable[[Pair], object]] = {
    "an attribute": lambda pair: set_weights(pair, two=mx.ones((4, 4))),
    "an item": lambda pair: pair.two.__setitem__("weight", mx.ones((4, 4))),
    "in place": lambda pair: pair.one.weight.__setitem__(2, 5.0),
    "update": lambda pair: pair.update({"one": {"weight": mx.ones((4, 4))}}),
    "a dict's own update": lambda pair: dict.update(pair.one, weight=mx.ones((4, 4))),
    "load_weights": lambda pair: pair.load_weights([("two.weight", mx.ones((4, 4)))], strict=False),
    "an array more": lambda pair: pair.one.__setitem__("bias", mx.ones((4,))),
    "an array less": lambda pair: pair.two.pop("bias"),
    "another shape": lambda pair: set_weights(pair, one=mx.ones((6, 4)), two=mx.ones((4, 6))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_arrays_that_change_count_in_the_next_call(change: str) -> None:
    by_form, pair, other = CompiledByForm(), Pair(), Pair()
    pair.two.bias, other.two.bias = mx.ones((4,)), mx.ones((4,))
    function, of_other = compiled(by_form, pair), compiled(by_form, other)
    before = function(X), of_other(X)
    CHANGES[change](pair)
    assert mx.array_equal(function(X), pair(X))
    assert not mx.array_equal(function(X), before[0])
    assert mx.array_equal(of_other(X), before[1])


@pytest.mark.parametrize("where", ["an array", "the child's", "another child"])
def test_what_lies_in_modules_that_are_not_watched_counts(where: str) -> None:
    by_form, outer = CompiledByForm(), Beside(nn.Linear(4, 4, bias=False))
    function = compiled(by_form, outer)
    before = function(X)
    if where == "an array":
        outer.own = mx.ones((4, 4))
    elif where == "the child's":
        outer.child.weight = mx.ones((4, 4))
    else:
        outer.child = nn.Linear(4, 4)
    assert mx.array_equal(function(X), outer(X))
    assert not mx.array_equal(function(X), before)


def test_gradients_go_through() -> None:
    pair = Pair()
    function = compiled(CompiledByForm(), pair)
    slopes = [nn.value_and_grad(pair, lambda run=run: run(X).sum())()[1] for run in (function, pair)]
    for name in ("one", "two"):
        assert mx.allclose(slopes[0][name]["weight"], slopes[1][name]["weight"])
        assert mx.abs(slopes[0][name]["weight"]).max() > 0


def test_a_trace_that_fails_leaves_the_arrays_where_they_were() -> None:
    pair = Pair()
    own = pair.one.weight, pair.two.weight
    with pytest.raises(ValueError, match="matmul"):
        compiled(CompiledByForm(), pair)(mx.ones((3, 5)))
    assert pair.one.weight is own[0]
    assert pair.two.weight is own[1]
    compiled(CompiledByForm(), pair)(X)
    assert pair.one.weight is own[0]


def test_forms() -> None:
    assert form_of(Pair()) == form_of(Pair()) != form_of(Pair(2))
    assert form_of(nn.RMSNorm(4)) != form_of(nn.RMSNorm(4, eps=1e-4))
    assert form_of(nn.Linear(4, 4)) != form_of(nn.Linear(4, 4, bias=False))
    assert form_of(MLP(4, 8)) == form_of(MLP(4, 8)) != form_of(nn.Linear(4, 8))
    one, other = Pair(), Pair()
    one.table, other.table = [nn.Linear(4, 4)], [nn.Linear(4, 4)]
    assert form_of(one) == form_of(other)
    one.table.append(nn.Linear(4, 4))
    assert form_of(one) != form_of(other)
    assert form_of(nn.Linear(4, 4).freeze()) != form_of(nn.Linear(4, 4))
    assert form_of(Beside(Pair(), 1)) != form_of(Beside(Pair(), 2))
    one, other = Pair(), Pair()
    one.width, other.width = {3}, {3}
    assert form_of(one) == form_of(other)
    one.width, other.width = object(), object()
    assert form_of(one) == form_of(one) != form_of(other)
    one.width = other.width = (3, mx.ones(2))
    assert form_of(one) == form_of(other)  # the very same array
    other.width = (3, mx.ones(2))
    assert form_of(one) != form_of(other)


def test_watched_modules_count_what_is_assigned() -> None:
    pair = Pair()
    changes: list[Callable[[], Any]] = [
        lambda: setattr(pair, "one", nn.Identity()),
        lambda: setattr(pair, "width", 1),
        lambda: pair.__setitem__("two", nn.Identity()),
        lambda: pair.update_modules({"two": nn.Linear(4, 4)}),
        lambda: delattr(pair, "two"),
        lambda: pair.__delitem__("one"),
    ]
    for change in changes:
        before = WatchedModule.assignments
        change()
        assert WatchedModule.assignments > before
    pair.weight = mx.ones(2)
    before = WatchedModule.assignments
    pair.weight = mx.zeros(2)
    pair["weight"] = mx.ones(3)
    assert WatchedModule.assignments == before
    pair.weight = None
    assert WatchedModule.assignments > before
    before = WatchedModule.assignments
    pair = Pair()
    made = WatchedModule.assignments
    pair.update(pair.parameters())
    pair(X)
    assert WatchedModule.assignments == made > before


@pytest.mark.parametrize(
    ("config", "traces"),
    [
        ({**DENSE, "num_hidden_layers": 6}, 2),
        ({**GOLDEN_MODELS["moe every second layer"][0], "num_hidden_layers": 6}, 3),
    ],
    ids=["dense", "MoE every second layer"],
)
def test_a_decoder_is_traced_once_for_each_form(monkeypatch: pytest.MonkeyPatch, config: Config, traces: int) -> None:
    """Before the first attention, and between any two: dense and dense; dense and experts, experts and dense."""
    model = Qwen3ForCausalLM(ModelConfig.from_dict(config))
    for layer in model.layers:
        layer.fuse(CPU)
    model.model.decoder = CompiledDecoder(model.model)
    calls: list[DecoderLayer] = []
    project = DecoderLayer.before_attention

    def before_attention(self: DecoderLayer, *arguments: Any) -> Any:
        calls.append(self)
        return project(self, *arguments)

    monkeypatch.setattr(DecoderLayer, "before_attention", before_attention)
    cache, token = make_cache(model), mx.array([[1]])
    model.model(token, cache)
    assert len(calls) == traces
    model.model(token, cache)
    assert len(calls) == traces
    model.model.layers[3].input_layernorm = RMSNorm(model.config.hidden_size, eps=0.5)
    model.model(token, cache)
    assert len(calls) == 2 * traces + 2  # two of another form: from the layer before, and to the one after
