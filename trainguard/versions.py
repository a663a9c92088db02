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
        "torch": str(torch.__version__),  # a class of torch's own, which `weights_only` refuses
        "numpy": numpy.__version__,
    }
