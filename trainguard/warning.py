"""Warnings that point at the user's own line, however deep in the package they arise."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings

INSIDE = (os.path.dirname(__file__) + os.sep, contextlib.__file__)  # which stands around what is `undisturbed`


def warn(message: str) -> None:
    """Warn at the first line outside of the package.

    Args:
        message: what is doubtful, and what to do about it.
    """
    level, frame = 2, sys._getframe().f_back
    while frame is not None and frame.f_code.co_filename.startswith(INSIDE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)
