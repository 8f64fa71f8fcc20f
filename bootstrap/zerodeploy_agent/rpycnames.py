"""What ``rpyc.X`` and ``rpyc.core.X`` are, found when asked for: the packages' own __init__ would import everything."""

from __future__ import annotations

import sys

_PLACES = {
    "rpyc.core.stream": ("SocketStream", "TunneledSocketStream", "PipeStream"),
    "rpyc.core.channel": ("Channel",),
    "rpyc.core.protocol": ("Connection", "DEFAULT_CONFIG"),
    "rpyc.core.netref": ("BaseNetref",),
    "rpyc.core.async_": ("AsyncResult", "AsyncResultTimeout"),
    "rpyc.core.service": ("Service", "VoidService", "SlaveService", "MasterService", "ClassicService"),
    "rpyc.core.vinegar": ("GenericException",),
    "rpyc.utils.factory": ("connect_stream", "connect_channel", "connect_pipes", "connect", "ssl_connect",
                           "connect_thread", "connect_subproc"),
    "rpyc.utils.helpers": ("async_", "timed", "buffiter", "BgServingThread", "restricted"),
    "rpyc.utils.server": ("OneShotServer", "ThreadedServer", "ThreadPoolServer", "ForkingServer"),
    "rpyc.lib": ("setup_logger", "spawn"),
}  # fmt: skip


def find(name: str) -> object:
    """The attribute *name* of rpyc. Raises AttributeError, as a module does."""
    for module, names in _PLACES.items():
        if name in names:
            __import__(module)
            return getattr(sys.modules[module], name)
    if name in ("classic", "utils"):
        __import__("rpyc.utils.classic")
        return sys.modules["rpyc.utils." + name if name == "classic" else "rpyc.utils"]
    raise AttributeError("module 'rpyc' has no attribute %r" % name)
