"""Services: a YAML file in, a supervised HTTP endpoint out, on any host."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from zerodeploy.services.launch import run as run


def __getattr__(name: str) -> object:
    if name != "run":
        raise AttributeError(f"module 'zerodeploy.services' has no attribute {name!r}")
    from zerodeploy.services.launch import run

    return run
