"""A look into a user's pipeline: every object that a data set or a transform is built of."""

from __future__ import annotations

import random
import types
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from trainguard.rng import GENERATOR_TYPES, Generator

LONGEST = 64  # a longer list is one of samples, or of a data set's parts
MOST = 5000  # objects looked at; pipelines have tens
LIBRARIES = ("torch", "torchvision", "timm", "numpy", "PIL", "datasets", "transformers", "albumentations", "builtins")
RANDOM = (*LIBRARIES, "random")  # whose modules and classes hold no generator of a user's
MACHINERY = ("logging", "threading", "asyncio", "concurrent")  # of the process, no part of any pipeline
LEAVES = (str, bytes, int, float, complex, bool, type(None), type, types.ModuleType, np.ndarray, torch.Tensor)


def walk(*roots: Any, networks: bool = True, methods: bool = False) -> Iterator[Any]:
    """Everything that can be reached from `roots`, nearest first, each object once.

    Goes through lists, tuples, dicts, attributes, `functools.partial`, bound methods, closures, and the globals that a
    function outside the known libraries names. Does not call anything. Arrays are left out, and lists longer than 64 of
    plain values; of objects, such as the parts of a data set, these come last.

    Args:
        *roots: where to start; they are given back too.
        networks: False leaves out modules with parameters, and what is in them.
        methods: True goes through all methods of classes outside the known libraries, not those alone that read a
            sample, and through what such a class holds itself.
    """
    queue, last, seen = deque(roots), deque[Any](), set[int]()
    while (queue or last) and len(seen) < MOST:
        found = (queue or last).popleft()
        if id(found) in seen or isinstance(found, LEAVES) or _top(type(found).__module__) in MACHINERY:
            continue
        seen.add(id(found))
        if _is_long(found):
            last.extend(islice(found.values() if isinstance(found, dict) else found, MOST))
        if not networks and isinstance(found, torch.nn.Module) and next(found.parameters(), None) is not None:
            continue
        yield found
        queue.extend(_parts(found))
        if methods:
            queue.extend(_held_by_class(found))


def attributes_of(found: Any) -> dict[str, Any]:
    """An object's own attributes, by name: in its `__dict__`, or in slots."""
    named = [getattr(kind, "__slots__", ()) for kind in type(found).__mro__]
    slots = [
        name
        for names in named
        for name in ((names,) if isinstance(names, str) else names)
        if not name.startswith("__") and hasattr(found, name)
    ]
    held = {}
    for name in slots:
        with suppress(AttributeError):  # an empty one, where `__getattr__` answers for everything
            held[name] = object.__getattribute__(found, name)
    return held | dict(getattr(found, "__dict__", {}))


def own_classes(found: Any) -> list[type]:
    """An object's classes that are of none of the known libraries."""
    return [kind for kind in type(found).__mro__ if _top(kind.__module__) not in RANDOM]


def find_generators(dataset: Any) -> list[Generator]:
    """The random generators that a data set, or the transforms in it, keep for themselves."""
    kept = [found for found in walk(dataset, methods=True) if isinstance(found, GENERATOR_TYPES)]
    return [found for found in kept if not isinstance(found, random.SystemRandom)]  # which has no state


def _is_long(found: Any) -> bool:
    """Whether this is a long list of objects that may hold a pipeline each."""
    if not isinstance(found, (list, tuple, dict)) or len(found) <= LONGEST:
        return False
    first = next(iter(found.values() if isinstance(found, dict) else found))
    return isinstance(first, GENERATOR_TYPES) or (
        hasattr(first, "__dict__") and not isinstance(first, (*LEAVES, Image))
    )


def _parts(found: Any) -> list[Any]:
    if isinstance(found, (list, tuple, set, frozenset)):
        return list(found) if len(found) <= LONGEST else []
    if isinstance(found, dict):
        return list(found.values()) if len(found) <= LONGEST else []
    if isinstance(found, partial):
        return [found.func, found.args, found.keywords]
    if isinstance(found, types.MethodType):
        return [found.__self__, found.__func__]
    if isinstance(found, types.FunctionType):
        return _parts_of_function(found)
    if isinstance(found, GENERATOR_TYPES):
        return []
    parts = list(attributes_of(found).values())
    for method in ("__getitem__", "__call__"):
        code = getattr(type(found), method, None)
        if isinstance(code, types.FunctionType) and not _from_library(code):
            parts.append(code)
    return parts


def _held_by_class(found: Any) -> list[Any]:
    """The methods of an object's classes, those of the known libraries left out, and the generators in them."""
    return [
        held
        for kind in own_classes(found)
        for held in vars(kind).values()
        if isinstance(held, (types.FunctionType, *GENERATOR_TYPES))
    ]


def _parts_of_function(function: types.FunctionType) -> list[Any]:
    if _from_library(function):
        return []
    parts = [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]
    parts += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    names = _names(function.__code__)
    used = [function.__globals__[name] for name in names if name in function.__globals__]
    modules = [one for one in used if isinstance(one, types.ModuleType) and _top(one.__name__) not in RANDOM]
    return [*parts, *used, *(vars(module)[name] for module in modules for name in names if name in vars(module))]


def _names(code: types.CodeType) -> list[str]:
    """Global names that a function uses, those in its comprehensions and inner functions included."""
    inner = [name for constant in code.co_consts if isinstance(constant, types.CodeType) for name in _names(constant)]
    return [*code.co_names, *inner]


def _from_library(function: types.FunctionType) -> bool:
    return _top(function.__module__ or "") in LIBRARIES


def _top(module: str) -> str:
    return module.split(".")[0]


def _filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # a closure variable that was not assigned yet
        return False
