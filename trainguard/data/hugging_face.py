"""A Hugging Face data set as a source: columns found by their types, and what `with_transform` makes of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from trainguard.data.samples import CHANNELS, Key, is_image
from trainguard.data.source import Source
from trainguard.errors import DataError


class HuggingFaceSource(Source):
    """A Hugging Face `Dataset`, read without its format: columns are found by their types."""

    def __init__(self, dataset: Any, image_column: Key | None, label_column: Key | None) -> None:
        import datasets

        transformed = dataset.format["type"] == "custom"  # there a name may be of what the transform gives
        self.transform = dataset.format["format_kwargs"].get("transform") if transformed else None
        self._wanted = image_column if transformed and image_column not in dataset.features else None
        image = _column(dataset, datasets.Image, None if self._wanted else image_column, "image")
        if transformed and label_column not in dataset.features:
            label_column = None
        label = _column(dataset, datasets.ClassLabel, label_column, "label")
        if image == label:
            raise DataError(f"the column {image!r} cannot be image and label: pass image_column= and label_column=")
        self.size = len(dataset)
        self.class_names = tuple(getattr(dataset.features[label], "names", None) or ()) or None
        self.raw = self.transform is not None
        self._dataset = dataset
        self._image, self._label = image, label
        self.label_key = label
        self._plain = self._paths = dataset.with_format(None).select_columns([image, label])
        self._numbers = not isinstance(dataset.features[image], (datasets.Image, datasets.Value, dict))
        if not self._numbers:  # files, bytes or paths
            self._paths = self._plain.cast_column(image, datasets.Image(decode=False))
            mode = getattr(dataset.features[image], "mode", None)
            self._plain = self._plain.cast_column(image, datasets.Image(mode=mode))

    def read(self, index: int) -> tuple[Any, Any]:
        """Image and label; see `Source.read`."""
        row = self._plain[index]
        if row[self._image] is None:
            raise ValueError("the row holds no image (null)")
        return np.asarray(row[self._image]) if self._numbers else row[self._image], row[self._label]

    def labels(self) -> list[Any]:
        """All labels, without reading an image."""
        return list(self._plain[self._label])

    def seen(self, index: int) -> Any:
        """The image through `with_transform`, else as stored."""
        if self.transform is None:
            return self.read(index)[0]
        return self._image_in(self._dataset[index])

    def path(self, index: int) -> str | None:
        """The file name stored with the image."""
        stored = None if self._numbers else self._paths[index][self._image]
        return stored["path"] if stored and stored["path"] else None

    def probe(self, image: Image.Image) -> Any:
        """The image through `with_transform`."""
        batch = self.transform({self._image: [image], self._label: [0]})
        return self._image_in({key: values[0] for key, values in batch.items()})

    def _image_in(self, row: dict[str, Any]) -> Any:
        """What training takes: the tensor that the transform made, beside the column that it was made of or not."""
        if self._wanted is not None and self._wanted not in row:
            raise DataError(
                f"neither the data set nor what with_transform gives has {self._wanted!r}: it has {', '.join(row)}"
            )
        found = [key for key in row if is_image(row[key])]
        made = [key for key in found if not isinstance(row[key], Image.Image) and _has_channels(row[key])]
        for meant in ([self._wanted], made, [self._image], found):
            if len(meant) == 1 and meant[0] in found:
                return row[meant[0]]
        raise DataError(f"expected one image in what with_transform gives, found {len(found)} in {', '.join(row)}")


def _has_channels(values: Any) -> bool:
    """Whether an array is of an image, and not of boxes or a mask."""
    return values.ndim == 3 and (values.shape[0] in CHANNELS or values.shape[-1] in CHANNELS)


def _column(dataset: Any, kind: type, wanted: Key | None, what: str) -> str:
    if wanted is not None:
        if wanted not in dataset.features:
            raise DataError(f"the data set has no column {wanted!r}: it has {', '.join(dataset.features)}")
        return str(wanted)
    found = [name for name, feature in dataset.features.items() if isinstance(feature, kind)]
    if len(found) != 1:
        count = f"{len(found)} ({', '.join(found)})" if found else f"none among {', '.join(dataset.features)}"
        raise DataError(f"expected one {kind.__name__} column, found {count}: pass {what}_column=")
    return found[0]
