"""A data set left as it was: what reading changes in it, and in the data sets inside it, is put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

from torch.utils.data import Dataset

from trainguard.data.walk import LONGEST


@contextmanager
def left_as_is(dataset: Any) -> Iterator[None]:
    """Put back, at the end, the attributes that a data set has now, and those of what it reads and transforms with.

    A file that one of them opens on its first read, and keeps, would else be shared with the processes that a loader
    forks later on; a transform that counts its calls would begin training in mid-count.

    Args:
        dataset: any; those under a subset are inside it.
    """
    before = [(each, attributes_of(each)) for each in _inside(dataset)]
    try:
        yield
    finally:
        for each, attributes in before:
            for name, value in attributes_of(each).items():
                if name not in attributes:
                    object.__delattr__(each, name)
                elif value is not attributes[name]:
                    object.__setattr__(each, name, attributes[name])
            for name in attributes.keys() - attributes_of(each).keys():
                object.__setattr__(each, name, attributes[name])


def attributes_of(found: Any) -> dict[str, Any]:
    """An object's own attributes, by name: in its `__dict__`, or in slots."""
    named = [getattr(kind, "__slots__", ()) for kind in type(found).__mro__]
    slots = [
        name for names in named for name in ((names,) if isinstance(names, str) else names) if hasattr(found, name)
    ]
    return {name: object.__getattribute__(found, name) for name in slots} | dict(getattr(found, "__dict__", {}))


def _inside(found: Any, depth: int = 4) -> Iterator[Any]:
    """A data set, and the data sets, timm readers and transforms in its attributes and in short lists there."""
    yield found
    for value in attributes_of(found).values() if depth else ():
        for each in value[:LONGEST] if isinstance(value, (list, tuple)) else [value]:
            transforms = callable(each) and not isinstance(each, (type, FunctionType, MethodType, BuiltinFunctionType))
            if transforms or isinstance(each, Dataset) or type(each).__module__.startswith("timm."):
                yield from _inside(each, depth - 1)
