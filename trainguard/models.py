"""The user's model as screening may use it: a working copy, made by name or by a function if need be, and checked."""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from trainguard.data.pixels import PixelRange
from trainguard.data.store import ImageStore
from trainguard.errors import ModelError

Model = nn.Module | Callable[[], nn.Module] | str
CHECKED = 4  # images that the check sends through the model

FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
HOOKS = (*FORWARD_HOOKS, "_backward_hooks", "_backward_pre_hooks")

_EVERY_MODULE = frozenset(vars(nn.Module()))  # what torch keeps in each


def working_copy(model: Model, images: ImageStore) -> nn.Module:
    """A model of the user's kind that shares nothing with the user's own, checked on a few images.

    Args:
        model: a module (deep-copied, without DDP, torch.compile, forward hooks and accelerate's patched forward), a
            function without arguments that returns a fresh one, or the name of a timm or torchvision model.
        images: what it must be able to classify.

    Returns:
        The copy, in eval mode and single precision, on the device of the module's parameters.

    Raises:
        ModelError: it cannot be copied, built or run, or its output does not fit the labels.
    """
    copied = build(model, images) if isinstance(model, str) else copy_of(model)
    copied.eval()
    try:
        check_model(copied, images)
    except ModelError as error:
        if isinstance(model, nn.Module) and own_hooks(model):
            raise ModelError(f"{error}; a copy has no forward hooks: pass a function that builds the model") from error
        raise
    return copied if dtype_of(copied) == torch.float32 else copied.float()


def bare(model: nn.Module) -> nn.Module:
    """The module inside DDP, DataParallel and torch.compile."""
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def build(name: str, images: ImageStore, *, library: str = "") -> nn.Module:
    """A fresh timm or torchvision model for these images, without downloaded weights.

    Args:
        name: of the model.
        images: what it is to classify.
        library: `"torchvision"` for its model of a name that timm has too, for another architecture.

    Raises:
        ModelError: neither library knows the name, or the model cannot be built for this image size.
    """
    import timm
    import torchvision.models
    from torchvision.models import get_model, list_models

    channels, height, width = images.fed_shape or images.shape
    try:
        if timm.is_model(name) and library != "torchvision":
            settings: dict[str, Any] = {"num_classes": images.num_classes, "in_chans": channels}
            try:  # transformers of a fixed size must be told the size; others do not know the word
                return timm.create_model(name, img_size=(height, width), **settings)
            except TypeError:
                return timm.create_model(name, **settings)
        if name in list_models(module=torchvision.models):  # not those that find or segment
            return get_model(name, weights=None, num_classes=images.num_classes)
    except Exception as error:  # every architecture refuses a size or a channel count in its own way
        raise ModelError(f"cannot build {name!r} for images of shape {images.shape}: {error}") from error
    raise ModelError(f"neither timm nor torchvision has a model {name!r}: pass a name from timm.list_models()")


def check_model(model: nn.Module, images: ImageStore) -> None:
    """Send a few images through a model in eval mode and look at what comes out.

    Raises:
        ModelError: it fails, gives NaN, or has another number of outputs than there are classes.
    """
    index = images.readable[:CHECKED]
    x = images.as_fed(index, device_of(model)).to(dtype_of(model))
    try:
        with torch.no_grad(), short_strides(model):
            output = logits_of(model(x))
    except Exception as error:  # whatever a user's forward may raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"the model cannot run on images of shape {tuple(x.shape)} from the data set: {reason[0]}"
        ) from error
    if not isinstance(output, Tensor) or output.ndim != 2:
        came = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ModelError(f"expected logits of shape ({len(x)}, {images.num_classes}) from the model, got {came}")
    needed = int(images.labels[images.readable].max()) + 1  # of a part of a data set, fewer than the whole has names
    if not needed <= output.shape[1] <= images.num_classes:
        raise ModelError(
            f"the model has {output.shape[1]} outputs, the data set has {images.num_classes} classes: give the model's "
            "last layer one output per class, or pass model=None to check nothing against it"
        )
    if not bool(torch.isfinite(output).all()):
        raise ModelError(
            "the model gives NaN or infinite outputs on images of the data set: check its weights and the pixel range "
            f"{images.pixel_range}"
        )


@contextmanager
def short_strides(net: nn.Module) -> Iterator[None]:
    """Shorten, by what is seen in the block, every stride that is longer than the side of what its layer is given.

    Such a layer gives a single row or column, by any stride. But where it pads, in bf16 on a CPU, torch's gradient of
    its weights is whatever lay in memory (torch 2.14, oneDNN): at times NaN, at times a wrong number. Deep networks on
    small images have such layers, a ResNet-18 on 16 pixels for one.

    Args:
        net: one of our own copies; what it gives for images of this size stays the same.
    """
    seen: dict[nn.Conv2d, tuple[int, ...]] = {}

    def look(layer: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        sides: tuple[int, ...] = tuple(next(iter((*inputs, *named.values()))).shape[-2:])
        seen[layer] = tuple(map(max, sides, seen.get(layer, sides)))  # a layer may be used on several sizes

    layers = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d) and not isinstance(layer.padding, str)]
    hooks = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    for layer, sides in seen.items():
        reach: Any = zip(sides, layer.kernel_size, layer.padding, layer.dilation, layer.stride, strict=True)
        layer.stride = tuple(  # type: ignore[assignment]
            side if side < stride and side + 2 * pad - dilation * (kernel - 1) - 1 < side else stride
            for side, kernel, pad, dilation, stride in reach
        )


def full_precision(device: torch.device) -> AbstractContextManager:
    """fp32 inside whatever autocast there is around it; not every kind of device knows autocast."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


class UnitPixels(nn.Module):
    """A classifier that eats images in [0, 1].

    Args:
        net: eats images in its own pixel range and gives logits, or an output that has `logits`.
        pixel_range: from unit pixels to the model's own.

    Attributes:
        format: the memory format in which the net gets the images, see `training.settle`.
        mixed: whether the net can run in the precision of an autocast around it, likewise.
    """

    def __init__(self, net: nn.Module, pixel_range: PixelRange) -> None:
        super().__init__()
        self.net = net
        self.pixel_range = pixel_range
        self.format = torch.channels_last
        self.mixed = True

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] to (B, K) logits."""
        # A copy, as the strides of a single channel fit both formats, and layers go by the strides.
        x = self.pixel_range.to_model(x).clone(memory_format=self.format)
        with nullcontext() if self.mixed else full_precision(x.device):
            return logits_of(self.net(x))


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters lie; the CPU for a model without any."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def dtype_of(model: nn.Module) -> torch.dtype:
    """What kind of numbers a model takes: that of its first floating-point weights."""
    found = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return next(found, torch.float32)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The weights and buffers in a model's state, where modules may keep other things as well (`get_extra_state`)."""
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def held_by(model: nn.Module) -> dict[str, Tensor]:
    """What `tensors_of` names, and the buffers that are kept out of the state, running statistics among them."""
    return dict(model.named_buffers()) | tensors_of(model)


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put weights and buffers into a model, all that `tensors_of` or `held_by` names, and leave its other state."""
    own = model.state_dict()
    model.load_state_dict({**own, **{name: value for name, value in tensors.items() if name in own}})
    for name, buffer in model.named_buffers():
        if name not in own and name in tensors:
            buffer.data = tensors[name].to(buffer.device, buffer.dtype, copy=True)


def digest_of(model: nn.Module) -> str:
    """SHA-256 of a model's weights and buffers with their names."""
    digest = hashlib.sha256()
    for name, value in tensors_of(model).items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def shapes_of(model: nn.Module) -> str:
    """SHA-256 of the names and shapes of a model's weights and buffers: its architecture, as far as they tell."""
    shapes = [(name, tuple(value.shape)) for name, value in tensors_of(model).items()]
    return hashlib.sha256(repr(shapes).encode()).hexdigest()


def logits_of(output: Any) -> Any:
    """The logits in a model's output: the output itself, or its `logits` (Hugging Face), attribute or entry."""
    return output.get("logits", output) if isinstance(output, dict) else getattr(output, "logits", output)


def copy_of(model: nn.Module | Callable[[], nn.Module], *, hooks: bool = False) -> nn.Module:
    """A copy of a model that shares nothing with it, without DDP, torch.compile and the user's hooks around it.

    Args:
        model: the model, or a function that returns a fresh copy of it, for one that cannot be deep-copied.
        hooks: with its hooks after all.

    Raises:
        ModelError: it is neither, or it cannot be deep-copied.
    """
    if not isinstance(model, nn.Module):
        if isinstance(model, str):
            raise ModelError(
                f"expected the trained model, got a name, {model!r}: load its weights first, or let purify_checkpoint "
                "or audit_checkpoint do so"
            )
        made = model() if callable(model) else model
        if not isinstance(made, nn.Module):
            raise ModelError(
                f"expected a model, a function that builds one, or a timm name, got {type(model).__name__}"
                + (f" that gives {type(made).__name__}" if callable(model) else "")
            )
        _refuse_empty(made)
        if own_hooks(bare(made)) and bare(model()) is not bare(made):  # type: ignore[operator]
            return bare(made)  # a copy's hooks would write down what they see in the model that it was made of
        try:
            return _copied(made)  # a function may give the same model every time
        except Exception as error:  # the reason to give a function
            if bare(model()) is bare(made):  # type: ignore[operator]
                raise ModelError(
                    f"the function gives the same {type(bare(made)).__name__} every time, and it cannot be copied "
                    f"({type(error).__name__}): let it build a new one at each call"
                ) from error
            return bare(made)
    _refuse_shards(model)
    _refuse_empty(model)
    try:
        copied = _copied(model)
    except ModelError:
        raise
    except Exception as error:  # weight_norm after a forward pass, locks and file handles: each in its own way
        raise ModelError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}): pass a function that builds the model"
        ) from error
    for held, key in [] if hooks else own_hooks(copied, HOOKS):
        del held[key]
    return copied


def _copied(model: nn.Module) -> nn.Module:
    """The module inside a model, copied, and what it calls in the place of a `forward` as well.

    Raises:
        ModelError: a `forward` was replaced by a function that holds on to modules, or a module keeps such a function:
            a copy would call the original.
    """
    copied = copy.deepcopy(bare(model))
    for module in list(copied.modules()):
        for name, child in list(module.named_children()):
            if bare(child) is not child:  # a compiled part calls the original's forward
                setattr(module, name, bare(child))
    own = vars(copied)
    if "_original_forward" in own:  # accelerate's: the function in its place is bound to the user's own weights
        own["forward"] = own.pop("_original_forward")
    for name, module in copied.named_modules():
        forward: Any = vars(module).get("forward")
        if hasattr(forward, "_torchdynamo_orig_callable"):  # compiled, of a method of the original
            forward = inspect.unwrap(forward)
            forward = vars(module)["forward"] = MethodType(getattr(forward, "__func__", forward), module)
        if forward is not None and getattr(forward, "__func__", None) is type(module).forward:  # as it is without
            del vars(module)["forward"]
        elif _holds_on(forward):
            raise ModelError(
                f"the forward of {name or type(module).__name__} was replaced by a function that calls the model "
                "itself, which a copy would call as well: pass a function that builds the model"
            )
        for attribute, value in vars(module).items():
            if attribute not in _EVERY_MODULE and any(_holds_on(each) for each in _functions_in(value)):
                raise ModelError(
                    f"{name or type(module).__name__} keeps a function in its {attribute!r} that calls the model "
                    "itself, and so would a copy's: make it a method, or pass a function that builds the model"
                )
    for value in (*copied.parameters(), *copied.buffers()):
        if any(step == 0 and side > 1 for step, side in zip(value.stride(), value.shape, strict=True)):
            value.data = value.data.clone(memory_format=torch.contiguous_format)  # an expanded one takes no new values
    return copied


def _functions_in(value: object) -> list[object]:
    """A function, or those in a list, a tuple or a dict."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
    return [each for each in inside if isinstance(each, (FunctionType, functools.partial))]


def _holds_on(function: object, seen: frozenset[int] = frozenset()) -> bool:
    """Whether a function has hold of modules: a copy of it has hold of the same ones, where a method is bound anew."""
    while isinstance(function, functools.partial):
        function = function.func
    if not isinstance(function, FunctionType) or id(function) in seen:
        return False
    with suppress(ValueError):  # a name that has no value yet
        held = inspect.getclosurevars(function)
        values = [*held.nonlocals.values(), *held.globals.values()]
        owners = [value.__self__ if isinstance(value, MethodType) else value for value in values]
        wrapped = held.nonlocals.values()  # a decorator's; what is global calls much that does not matter
        seen |= {id(function)}
        return any(isinstance(owner, nn.Module) for owner in owners) or any(_holds_on(each, seen) for each in wrapped)
    return False


def own_hooks(model: nn.Module, kinds: Sequence[str] = FORWARD_HOOKS) -> list[tuple[dict[int, Any], int]]:
    """Where a user's hooks are, and under which keys; torch's own make weights, or give them their shape."""
    modules = [m for m in model.modules() if not (isinstance(m, LazyModuleMixin) and m.has_uninitialized_params())]
    places = [getattr(module, kind) for module in modules for kind in kinds]
    return [
        (held, key)
        for held in places
        for key, hook in held.items()
        if not type(hook).__module__.startswith("torch.nn.utils")
    ]


def _refuse_empty(model: nn.Module) -> None:
    lazy = UninitializedBuffer, UninitializedParameter
    if any(isinstance(each, lazy) for each in (*model.parameters(), *model.buffers())):
        raise ModelError("the model has no weights yet (it has lazy layers): run an image through it first")
    if any(parameter.is_meta and type(parameter.data) is Tensor for parameter in model.parameters()):
        raise ModelError("the model has no weights yet (it lies on the meta device): give it some first")


def _refuse_shards(model: nn.Module) -> None:
    """No copy of this process's part of a model is a model."""
    kinds = {ancestor.__name__ for module in model.modules() for ancestor in type(module).__mro__}
    parameters = list(model.parameters())
    if kinds & {"FullyShardedDataParallel", "FSDPModule"} or any(type(p).__name__ == "DTensor" for p in parameters):
        how = "FSDP"
    elif "DeepSpeedEngine" in kinds or any(hasattr(parameter, "ds_id") for parameter in parameters):  # ZeRO-3
        how = "DeepSpeed"
    else:
        return
    raise ModelError(
        f"the model is split among processes ({how}), so it cannot be copied here: pass a function that builds a fresh "
        "one in its place"
    )
