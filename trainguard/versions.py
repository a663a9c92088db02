"""What a result was made with, for whoever wants to make it again."""

from __future__ import annotations

import platform

import numpy
import torch


def versions() -> dict[str, str]:
    """Versions of trainguard, Python and the libraries that figures depend on."""
    from trainguard import __version__

    return {
        "trainguard": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
    }
