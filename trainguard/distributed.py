r"""Work shared by index over processes: every rank does its part, all ranks end with the same arrays and decisions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from trainguard.errors import StateError


class Group:
    """The processes of `torch.distributed`, named as accelerate names its own; where to work is left open."""

    device = None

    def __init__(self) -> None:
        self.process_index = torch.distributed.get_rank()
        self.num_processes = torch.distributed.get_world_size()

    @classmethod
    def running(cls) -> Group | None:
        """The default group; None where none has been set up, as in a run of one process."""
        return cls() if torch.distributed.is_available() and torch.distributed.is_initialized() else None


class Processes:
    """The ranks of one run. Without an accelerator there is one, and every method is free.

    Args:
        rank: of this process, 0 to `world` - 1.
        world: how many processes there are.
    """

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world

    @classmethod
    def of(cls, accelerator: Any | None) -> Processes:
        """The processes of an `accelerate.Accelerator`; a single one for None.

        Raises:
            ValueError: it is none.
        """
        if accelerator is not None and not hasattr(accelerator, "num_processes"):
            raise ValueError(
                f"expected accelerator= as an accelerate.Accelerator, got {type(accelerator).__name__}: pass what else "
                "there is by its name, such as epochs=30"
            )
        if accelerator is None or accelerator.num_processes == 1:
            return cls()
        return cls(accelerator.process_index, accelerator.num_processes)

    def over(self, fingerprint: str) -> Processes:
        """These processes where all of them hold the same data, else this one alone: work is shared by index."""
        return self if len(set(self.gathered(fingerprint))) == 1 else Processes()

    @property
    def is_main(self) -> bool:
        """True on the process that writes files and shows progress."""
        return self.rank == 0

    def share(self, index: np.ndarray) -> np.ndarray:
        """This rank's part of a list of indices: every `world`-th one."""
        return index[self.rank :: self.world]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value` on every rank."""
        if self.world == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def told(self, find: Callable[[], Any]) -> Any:
        """What rank 0 finds, on every rank; what a saved state or the disk makes it raise, likewise."""
        found: Any = None
        if self.is_main:
            try:
                found = find()
            except (StateError, OSError) as error:
                found = error
        found = self.broadcast(found)
        if isinstance(found, Exception):
            raise found
        return found

    def gathered(self, value: Any) -> list[Any]:
        """Every rank's `value`, in their order."""
        values: list[Any] = [value] * self.world
        if self.world > 1:
            torch.distributed.all_gather_object(values, value)
        return values

    def mean(self, value: float) -> float:
        """The mean of the ranks' values, the same on every rank."""
        return value if self.world == 1 else float(np.mean(self.gathered(value)))

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world > 1:
            torch.distributed.barrier()

    def merge(self, index: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
        """Put the ranks' per-sample values together.

        Args:
            index: (B,) int64, the samples that this rank worked on.
            values: (B, ...) their values.
            n: length of the merged array.

        Returns:
            (n, ...) of the values' type on every rank; zero where no rank worked.

        Raises:
            RuntimeError: two ranks worked on one sample.
        """
        parts = self.gathered((index, values))
        shape = next((part.shape[1:] for places, part in parts if len(places)), values.shape[1:])  # not of an idle rank
        merged = np.zeros((n, *shape), dtype=values.dtype)
        times = np.zeros(n, dtype=np.int64)
        for places, part in parts:
            merged[places] = part
            times[places] += 1
        if times.max(initial=0) > 1:
            raise RuntimeError(f"sample {int(times.argmax())} was worked on twice: the ranks' parts overlap")
        return merged

    def average_gradients(self, model: nn.Module, weight: float = 1.0) -> None:
        """Replace each gradient by its mean over the ranks, weighted by how many samples each rank had.

        Args:
            model: the same on every rank; its gradients are changed in place.
            weight: this rank's share of the batch times `world`; 1 where all ranks had equally many samples.
        """
        if self.world == 1:
            return
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in gradients]) * (weight / self.world)
        torch.distributed.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def align(self, model: nn.Module) -> None:
        """Rank 0's weights and buffers for all, against drift between devices whose sums differ in the last bit."""
        if self.world > 1:
            for value in model.state_dict().values():
                if isinstance(value, torch.Tensor):  # modules may keep other things in their state
                    torch.distributed.broadcast(value, src=0)

    def average_buffers(self, model: nn.Module) -> None:
        """Replace each floating-point buffer (BatchNorm's running statistics) by its mean over the ranks."""
        if self.world == 1:
            return
        for buffer in model.buffers():
            if buffer.is_floating_point():
                torch.distributed.all_reduce(buffer)
                buffer.div_(self.world)
