"""Functions of modules, compiled once for all modules of one form: each call is given the arrays of its own.

So one trace serves all layers. It is made once, and stays in the processor's caches from one layer to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxqwen.model.watched import WatchedModule

__all__ = ["CompiledByForm", "form_of"]


class CompiledByForm:
    """Compiles functions of modules; those of modules of one form share what is compiled."""

    def __init__(self) -> None:
        self._compiled: dict[object, Callable[..., Any]] = {}

    def compile(
        self, make: Callable[..., Callable[..., Any]], modules: Sequence[nn.Module], parts: Sequence[nn.Module]
    ) -> Callable[..., Any]:
        """`make(*modules)`, compiled.

        Arrays that are changed, or put in the place of others, count in the next call. Where a watched module gets
        another child, compile anew.

        Args:
            make: gives a function of arrays.
            modules: what it is made of.
            parts: those of them, or of their children, whose arrays it reads.
        """
        form = make, tuple(map(form_of, modules))
        holders = [holder for part in parts for holder in _holders(part)]
        if form not in self._compiled:
            self._compiled[form] = mx.compile(_given_arrays(make(*modules), holders))
        compiled, sources = self._compiled[form], [*map(_source, holders)]

        def call(*inputs: mx.array) -> Any:
            return compiled(inputs, [*chain.from_iterable(sources)])

        return call


def form_of(value: object) -> object:
    """All of a module but its arrays: equal for two that compute the same from equal arrays."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        inside = tuple((key, mx.array if isinstance(item, mx.array) else form_of(item)) for key, item in items)
        attributes = vars(value) if isinstance(value, nn.Module) else {}
        return type(value), inside, tuple((name, form_of(attributes[name])) for name in sorted(attributes))
    if isinstance(value, tuple):
        return tuple(map(form_of, value))
    if isinstance(value, set):
        return frozenset(value)
    return (type(value), value) if isinstance(value, str | int | float) else _Itself(value)


class _Itself:
    """Equal to nothing but the same object."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self._value is other._value

    def __hash__(self) -> int:
        return id(self._value)


def _holders(part: nn.Module) -> Iterator[nn.Module]:
    """The modules that hold a part's arrays, down to those whose children could be replaced unseen."""
    children = [*part.values()]
    if isinstance(part, WatchedModule) and children and all(isinstance(child, nn.Module) for child in children):
        for child in children:
            yield from _holders(child)
    else:
        yield part


def _source(holder: nn.Module) -> Iterable[Any]:
    """What gives a holder's arrays, those that were assigned meanwhile too; or the holder, for MLX to look through."""
    return holder.values() if all(isinstance(value, mx.array) for value in holder.values()) else (holder,)


def _given_arrays(function: Callable[..., Any], holders: Sequence[nn.Module]) -> Callable[..., Any]:
    """`function` as one of its inputs and the holders' arrays, in whose places other arrays stand meanwhile."""

    def run(inputs: Sequence[mx.array], arrays: Sequence[Any]) -> Any:
        places, given = [*_places(holders)], [*_places(arrays)]
        own = [inside[key] for inside, key in places]
        _put(places, [inside[key] for inside, key in given])
        try:
            return function(*inputs)
        finally:
            _put(places, own)

    return run


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Where the arrays of a tree are, as containers and keys, in MLX's order."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(value, mx.array):
            yield tree, key
        elif isinstance(value, dict | list):
            yield from _places(value)


def _put(places: Sequence[tuple[Any, Any]], arrays: Sequence[mx.array]) -> None:
    for (inside, key), array in zip(places, arrays, strict=True):
        if isinstance(inside, dict):
            dict.__setitem__(inside, key, array)  # nothing to watch: it is there for the time of a trace
        else:
            inside[key] = array
