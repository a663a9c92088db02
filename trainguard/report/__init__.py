"""A result as pictures and one self-contained page."""

from trainguard.report.page import build

__all__ = ["build"]
