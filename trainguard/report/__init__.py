"""A result as pictures and one self-contained page."""

from trainguard.report.evidence import Evidence, collect_evidence
from trainguard.report.page import build

__all__ = ["Evidence", "build", "collect_evidence"]
