"""What every kind of data set has in common for whoever reads it: samples decoded, but not augmented."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from PIL import Image


class Source(ABC):
    """A data set as screening reads it, in the data set's own index space.

    Attributes:
        size: number of samples.
        class_names: names of the classes, or None where the data set does not know them.
        transform: what to look through for a normalisation.
        raw: whether `read` leaves out a transform that training applies.
        label_key: the column of the label, where samples have columns and it is known.
    """

    size: int
    class_names: tuple[str, ...] | None
    transform: Any
    raw: bool
    label_key: str | None = None

    @abstractmethod
    def read(self, index: int) -> tuple[Any, Any]:
        """Image and label of one sample, without the training transform where the data set lets it be left out."""

    @abstractmethod
    def seen(self, index: int) -> Any:
        """The image as training sees it, through the transform."""

    @abstractmethod
    def path(self, index: int) -> str | None:
        """The file that holds a sample's image, where there is one."""

    @abstractmethod
    def probe(self, image: Image.Image) -> Any:
        """One PIL image sent through the transform."""

    def left_as_is(self) -> AbstractContextManager:
        """What reads the data set inside leaves no trace in it, such as a file that is opened on the first read."""
        return nullcontext()
