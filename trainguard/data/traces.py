"""A data set left as it was: what reading changes in it, and in whatever it reads and transforms with, is put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

from trainguard.data.walk import MOST, attributes_of, walk

NOT_CHANGED = (FunctionType, MethodType, BuiltinFunctionType, tuple, set, frozenset)
BOXES = ("builtins", "collections")  # whose lists and dicts can be filled again


@contextmanager
def left_as_is(*roots: Any) -> Iterator[None]:
    """Put back, at the end, what the objects have now that a data set reads and transforms with, wherever it has them.

    A file that one of them opens on its first read, and keeps, would else be shared with the processes that a loader
    forks later on, which then read from one another's places; a transform that counts its calls would begin training in
    mid-count.

    Args:
        *roots: data sets, those inside them included, and functions.
    """
    reached = [each for each in walk(*roots, networks=False) if not isinstance(each, NOT_CHANGED)]
    objects = [(each, attributes_of(each)) for each in reached if not isinstance(each, (list, dict))]
    boxes = [(each, each.copy()) for each in reached if _can_be_filled_again(each)]
    try:
        yield
    finally:
        for each, attributes in objects:
            _set_back(each, attributes)
        for box, held in boxes:
            _fill_again(box, held)


def _set_back(found: Any, attributes: dict[str, Any]) -> None:
    for name, value in attributes_of(found).items():
        if name not in attributes:
            object.__delattr__(found, name)
        elif value is not attributes[name]:
            object.__setattr__(found, name, attributes[name])
    for name in attributes.keys() - attributes_of(found).keys():
        object.__setattr__(found, name, attributes[name])


def _can_be_filled_again(found: Any) -> bool:
    return isinstance(found, (list, dict)) and type(found).__module__ in BOXES and len(found) <= MOST


def _fill_again(box: Any, held: Any) -> None:
    if isinstance(box, dict):
        if box.keys() != held.keys() or any(box[key] is not value for key, value in held.items()):
            box.clear()
            box.update(held)
    elif len(box) != len(held) or any(one is not other for one, other in zip(box, held, strict=True)):
        box[:] = held
