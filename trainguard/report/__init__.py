"""A result as pictures and one self-contained page."""

from trainguard.report.evidence import Evidence, collect_evidence

__all__ = ["Evidence", "collect_evidence"]
