"""zerodeploy: any host that you can ssh to as a live Python object, with nothing installed there and nothing left."""

from __future__ import annotations

from zerodeploy.errors import *  # noqa: F403
from zerodeploy.errors import __all__ as _errors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from zerodeploy.deployment.info import ServerInfo as ServerInfo
    from zerodeploy.deployment.multi import MultiServerDeployment as MultiServerDeployment
    from zerodeploy.deployment.payload import Payload as Payload
    from zerodeploy.deployment.server import DeployedServer as DeployedServer
    from zerodeploy.link.command import CommandLink as CommandLink

__version__ = "0.1.0"
__all__ = sorted(["CommandLink", "DeployedServer", "MultiServerDeployment", "Payload", "ServerInfo", *_errors])

_HOMES = {
    "CommandLink": "zerodeploy.link.command",
    "DeployedServer": "zerodeploy.deployment.server",
    "MultiServerDeployment": "zerodeploy.deployment.multi",
    "Payload": "zerodeploy.deployment.payload",
    "ServerInfo": "zerodeploy.deployment.info",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'zerodeploy' has no attribute {name!r}")
    import importlib

    if name in ("DeployedServer", "MultiServerDeployment"):
        # a program that uses the class will connect: rpyc's import must not count into its first connection. The
        # command line imports the module itself and does without
        importlib.import_module("zerodeploy.control.rpyc_client")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
