"""A data set left as it was: what reading changes in it, and in whatever it reads and transforms with, is put back."""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import _lru_cache_wrapper
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from trainguard.data.walk import attributes_of, own_classes, walk

NOT_CHANGED = (FunctionType, MethodType, BuiltinFunctionType, tuple, frozenset, Image)  # a file that is read is closed
BOXES = (list, dict, set, deque)  # that can be filled again
PLAIN = (int, float, bool, str, type(None))
LIBRARIES = ("builtins", "collections")  # whose own kinds of these can
LARGEST = 2_000_000  # entries of these, and numbers in an array that counts or keeps something; larger ones are data


@contextmanager
def left_as_is(*roots: Any) -> Iterator[None]:
    """Put back, at the end, what the objects have now that a data set reads and transforms with, wherever it has them.

    A file that one of them opens on its first read, and keeps, would else be shared with the processes that a loader
    forks later on, which then read from one another's places; a transform that counts its calls would begin training in
    mid-count. So are lists, dicts, sets and deques filled again, small arrays, numbers that processes share, and what
    classes of the user's own count; caches of functions that were empty are emptied.

    Args:
        *roots: data sets, those inside them included, and functions.
    """
    reached = [each for each in walk(*roots, networks=False) if not isinstance(each, NOT_CHANGED)]
    objects = [(each, attributes_of(each)) for each in reached if not isinstance(each, BOXES)]
    boxes = [(each, each.copy()) for each in reached if _can_be_filled_again(each)]
    arrays = [(each, _copied(each)) for _, held in objects for each in held.values() if _is_small(each)]
    arrays += [(each, each.value) for each in reached if isinstance(each, ctypes._SimpleCData)]
    arrays += [(each, each[:]) for each in reached if isinstance(each, ctypes.Array) and len(each) <= LARGEST]
    kinds = {kind: _counted_by(kind) for each, _ in objects for kind in own_classes(each)}
    functions = [*reached, *(value for kind in kinds for value in vars(kind).values())]
    caches = [each for each in functions if isinstance(each, _lru_cache_wrapper) and not each.cache_info().currsize]
    try:
        yield
    finally:
        for each, attributes in objects:
            _set_back(each, attributes)
        for kind, counted in kinds.items():
            for name, value in counted.items():
                if vars(kind).get(name) is not value:
                    setattr(kind, name, value)
        for cache in caches:
            cache.cache_clear()
        for box, held in boxes:
            _fill_again(box, held)
        for array, held in arrays:
            if isinstance(array, ctypes._SimpleCData):
                array.value = held
            elif isinstance(array, ctypes.Array):
                array[:] = held
            elif isinstance(array, np.ndarray) or not torch.equal(array, held):
                array[...] = held


def _set_back(found: Any, attributes: dict[str, Any]) -> None:
    now = attributes_of(found)
    for name in now.keys() - attributes.keys():
        _without_hooks(found, "__delattr__", name)
    for name, value in attributes.items():
        if name not in now or now[name] is not value:
            _without_hooks(found, "__setattr__", name, value)


def _without_hooks(found: Any, method: str, *arguments: Any) -> None:
    """Set or delete an attribute, whatever the class has to say to that; a few kinds of C's insist on their own way."""
    try:
        getattr(object, method)(found, *arguments)
    except TypeError:  # `threading.local`
        getattr(found, method)(*arguments)


def _counted_by(kind: type) -> dict[str, Any]:
    """What a class itself holds of plain values, by name."""
    return {name: value for name, value in vars(kind).items() if type(value) in PLAIN and not name.startswith("__")}


def _can_be_filled_again(found: Any) -> bool:
    return isinstance(found, BOXES) and type(found).__module__ in LIBRARIES and len(found) <= LARGEST


def _is_small(found: Any) -> bool:
    """Whether this is an array that may be copied, and written to."""
    if type(found) is np.ndarray:
        return found.size <= LARGEST and found.flags.writeable
    plain = type(found) is torch.Tensor and found.device.type == "cpu" and found.layout == torch.strided
    return plain and found.numel() <= LARGEST and not found.requires_grad


def _copied(array: Any) -> Any:
    return array.copy() if isinstance(array, np.ndarray) else array.clone()


def _fill_again(box: Any, held: Any) -> None:
    if isinstance(box, dict):
        same = box.keys() == held.keys() and all(box[key] is value for key, value in held.items())
    elif isinstance(box, set):
        same = box == held
    else:
        same = len(box) == len(held) and all(one is other for one, other in zip(box, held, strict=True))
    if not same:
        box.clear()
        (box.update if isinstance(box, (dict, set)) else box.extend)(held)
