"""Random numbers that leave the user's own streams where they were."""

import random
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

Generator = torch.Generator | np.random.Generator | np.random.RandomState | random.Random
GENERATOR_TYPES = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


def seed_streams(seed: int, generators: Iterable[Generator] = ()) -> None:
    """Seed torch on the CPU, numpy and python, and the given generators.

    A GPU is left out on purpose: this runs once per sample, and `torch.manual_seed` before CUDA starts formats a stack
    trace at every call.

    Args:
        seed: any non-negative integer.
        generators: further generators, such as those a data set keeps for itself.
    """
    seed = int(seed) % 2**32  # numpy's integers are none to torch
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    for generator in generators:
        if isinstance(generator, torch.Generator):
            generator.manual_seed(seed)
        elif isinstance(generator, np.random.Generator):
            generator.bit_generator.state = type(generator.bit_generator)(seed).state
        else:
            generator.seed(seed)


def seed_devices(seed: int) -> None:
    """Seed torch on the CPU and, where it has started, on CUDA: the streams that `isolated_rng` puts back."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


@contextmanager
def undisturbed(seed: int) -> Iterator[None]:
    """Work of our own in the midst of a user's, all put back: on other random numbers, with gradients, in float32.

    What a script has made numpy raise of overflow and the like is for its own numbers, not for ours.

    Where work of ours is in half precision it says so itself, and the user's own autocast has no say.

    Args:
        seed: see `isolated_rng`.
    """
    precision = torch.get_default_dtype()
    with isolated_rng(seed), torch.inference_mode(False), torch.enable_grad(), ExitStack() as off:
        off.enter_context(np.errstate(divide="warn", over="warn", under="ignore", invalid="warn"))
        for kind in {"cpu", torch.get_default_device().type, *_accelerators()}:
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                off.enter_context(torch.autocast(kind, enabled=False))
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(precision)


def _accelerators() -> list[str]:
    found = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else None
    return [found.type] if found is not None else ["cuda"]


@contextmanager
def isolated_rng(seed: int, generators: Iterable[Generator] = ()) -> Iterator[None]:
    """Run a block on its own random numbers and put every stream back afterwards, also when the block raises.

    Covers torch (CPU and CUDA), numpy, python, and the given generators. If CUDA first starts inside the block, its
    streams are set on the way out to the state they would have had: the seed that torch was last given.

    Inside the block new tensors lie on the CPU unless a place is named, whatever `torch.set_default_device` said.

    Args:
        seed: what the streams are seeded with inside the block.
        generators: further generators to seed, save and restore.
    """
    generators = list(generators)
    saved = [_state(generator) for generator in generators]
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    initial_seed = torch.initial_seed()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        seed_streams(seed, generators)
        if cuda_states is not None:
            torch.cuda.manual_seed_all(seed)
        with nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"):
            yield
    finally:
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)
        elif torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(initial_seed)
        # Seeding is what sets torch.initial_seed(), which the data loader's workers of some libraries read.
        torch.default_generator.manual_seed(initial_seed)
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        for generator, state in zip(generators, saved, strict=True):
            _restore(generator, state)


def _state(generator: Generator) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, random.Random):
        return generator.getstate()
    return generator.get_state()


def _restore(generator: Generator, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)
