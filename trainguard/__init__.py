"""Train image classifiers on data you did not make: screen for backdoor poison, train clean, purify."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainguard.guard import Guard
    from trainguard.purification.audit import audit
    from trainguard.purification.progressive import purify
    from trainguard.purification.results import AuditResult, PurifyResult
    from trainguard.results import ScreenResult
    from trainguard.screening.screen import screen

__all__ = ["AuditResult", "Guard", "PurifyResult", "ScreenResult", "__version__", "audit", "purify", "screen"]

_HOMES = {
    "Guard": "trainguard.guard",
    "screen": "trainguard.screening.screen",
    "ScreenResult": "trainguard.results",
    "audit": "trainguard.purification.audit",
    "purify": "trainguard.purification.progressive",
    "AuditResult": "trainguard.purification.results",
    "PurifyResult": "trainguard.purification.results",
}

try:
    __version__ = version("trainguard")
except PackageNotFoundError:  # used from a checkout that was not installed
    __version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `import trainguard` alone takes no time."""
    if name not in _HOMES:
        raise AttributeError(f"module 'trainguard' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
