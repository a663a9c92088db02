"""A data set left as it was: what reading changes in it, and in whatever it reads and transforms with, is put back."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch

from trainguard.data.walk import attributes_of, walk

NOT_CHANGED = (FunctionType, MethodType, BuiltinFunctionType, tuple, frozenset)
BOXES = (list, dict, set, deque)  # that can be filled again
LIBRARIES = ("builtins", "collections")  # whose own kinds of these can
LARGEST = 2_000_000  # of these
SMALL = 65_536  # numbers in an array that counts or keeps something; larger ones are data


@contextmanager
def left_as_is(*roots: Any) -> Iterator[None]:
    """Put back, at the end, what the objects have now that a data set reads and transforms with, wherever it has them.

    A file that one of them opens on its first read, and keeps, would else be shared with the processes that a loader
    forks later on, which then read from one another's places; a transform that counts its calls would begin training in
    mid-count. So are lists, dicts, sets and deques filled again, and small arrays.

    Args:
        *roots: data sets, those inside them included, and functions.
    """
    reached = [each for each in walk(*roots, networks=False) if not isinstance(each, NOT_CHANGED)]
    objects = [(each, attributes_of(each)) for each in reached if not isinstance(each, BOXES)]
    boxes = [(each, each.copy()) for each in reached if _can_be_filled_again(each)]
    arrays = [(each, _copied(each)) for _, held in objects for each in held.values() if _is_small(each)]
    try:
        yield
    finally:
        for each, attributes in objects:
            _set_back(each, attributes)
        for box, held in boxes:
            _fill_again(box, held)
        for array, held in arrays:
            if isinstance(array, np.ndarray) or not torch.equal(array, held):
                array[...] = held


def _set_back(found: Any, attributes: dict[str, Any]) -> None:
    for name, value in attributes_of(found).items():
        if name not in attributes:
            object.__delattr__(found, name)
        elif value is not attributes[name]:
            object.__setattr__(found, name, attributes[name])
    for name in attributes.keys() - attributes_of(found).keys():
        object.__setattr__(found, name, attributes[name])


def _can_be_filled_again(found: Any) -> bool:
    return isinstance(found, BOXES) and type(found).__module__ in LIBRARIES and len(found) <= LARGEST


def _is_small(found: Any) -> bool:
    """Whether this is an array that may be copied, and written to."""
    if type(found) is np.ndarray:
        return found.size <= SMALL and found.flags.writeable
    plain = type(found) is torch.Tensor and found.device.type == "cpu" and found.layout == torch.strided
    return plain and found.numel() <= SMALL and not found.requires_grad


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
