"""A pretended accelerator: tensors that say they are elsewhere, are computed on the CPU, and refuse to mix with others.

torch's device `meta` lends its name. What an accelerator refuses is refused here as well: an operation on tensors of
two devices, a CPU generator for a draw on the device, `numpy()` of what lies there.
"""

from contextlib import contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
CPU = torch.device("cpu")
MADE = ("tensor", "as_tensor", "zeros", "ones", "full", "empty", "rand", "randn", "randint", "randperm", "arange")
INDEXED = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten._index_put_impl_.default)


class Far(torch.Tensor):
    """A tensor that lies there; `near` is what it is computed with."""

    @staticmethod
    def __new__(cls, near):
        far = torch.Tensor._make_wrapper_subclass(
            cls,
            near.size(),
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=DEVICE,
        )
        far.near = near
        return far

    def tolist(self):
        return self.near.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _computed(function, args, kwargs or {})


class _Elsewhere(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _computed(function, args, kwargs or {})


@contextmanager
def pretended():
    """Within, `DEVICE` can be computed on."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a parameter's data cannot change its class
    made = {name: _made(getattr(torch, name)) for name in MADE}
    try:
        with mock.patch.multiple(torch, **made), _Elsewhere():
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


def _made(function):
    def make(*args, device=None, **kwargs):
        if device is None or torch.device(device) != DEVICE:
            return function(*args, **kwargs, **({} if device is None else {"device": device}))
        _same_generator(kwargs, True)
        return Far(function(*args, **kwargs))

    return make


def _computed(function, args, kwargs):
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    far = any(isinstance(x, Far) for x in tensors)
    goal = kwargs.get("device")
    moved = function is torch.ops.aten._to_copy.default or function is torch.ops.aten.copy_.default
    if far and not moved:
        _same_device(function, tensors)
    there = far if goal is None else torch.device(goal) == DEVICE
    _same_generator(kwargs, far or there)
    near, options = tree_map(lambda x: x.near if isinstance(x, Far) else x, (args, kwargs))
    out = function(*near, **(options | ({"device": CPU} if goal is not None else {})))
    if function is torch.ops.aten.copy_.default:
        return args[0]
    if not there:
        return out
    own = {id(x.near): x for x in tensors if isinstance(x, Far)}  # what was changed in place stays what it was
    return tree_map(lambda x: own[id(x)] if id(x) in own else Far(x) if isinstance(x, torch.Tensor) else x, out)


def _same_device(function, tensors):
    for place, x in enumerate(tensors):
        indexing = function in INDEXED and place > 0 and not x.is_floating_point()
        if not isinstance(x, Far) and x.ndim and not indexing:
            raise RuntimeError(
                f"expected all tensors on one device: {function} got a CPU tensor of {tuple(x.shape)} too"
            )


def _same_generator(kwargs, there):
    if there and kwargs.get("generator") is not None:
        raise RuntimeError("expected the device's own generator, got one of the CPU")
