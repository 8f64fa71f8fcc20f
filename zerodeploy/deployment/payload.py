"""`Payload`: what a deployment brings along besides the agent."""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from zerodeploy.control import shipping
from zerodeploy.control.client import Client
from zerodeploy.deployment.progress import Transfer
from zerodeploy.errors import PayloadError, UsageError
from zerodeploy.payload import wheels
from zerodeploy.payload.bundles import Bundle, Content, pack
from zerodeploy.payload.modules import Modules, collect

__all__ = ["Payload", "payload_of"]


class Payload:
    """Modules, wheels and a zipapp for hosts. Made once, it can be shipped to as many as there are.

    Args:
        modules: modules of this program, their names, or paths: packages with their data, directories, single files. They
            come behind the standard library and before all else on the host's ``sys.path``, and before wheels.
        requirements: what to install from wheels that fit the host's Python and platform: a list as ``["numpy>=2"]``, the
            path of a requirements file, or ``"pyproject.toml[extra]"``. Resolved and fetched here, with uv.
        lock: the path of a ``uv.lock`` (``uv.lock[extra]``) or a ``pylock.toml``, to install exactly what it says.
        forward_imports: names of packages that the host may ask for when it imports them: one round trip for each package,
            none for anything else.
        zipapp: the path of a zipapp, made by shiv, pex or ``python -m zipapp``: what is in it can be imported.
        keep: ``"cache"``: wheels, modules and zipapp stay in a cache of the user's on the host (``~/.cache/zerodeploy``, 0700, at
            most 2 GiB, verified by hash before use). Default: nothing stays.

    Raises:
        UsageError: an argument makes no sense.
        PayloadError: a module that is not there or can't be shipped, a file that can't be read.
    """

    def __init__(self, *, modules: object = None, requirements: object = None, lock: object = None,
                 forward_imports: Sequence[str] = (), zipapp: str | os.PathLike[str] | None = None, keep: str | None = None) -> None:  # fmt: skip
        if keep not in (None, "cache"):
            raise UsageError(f'keep is "cache" or None, not {keep!r}')
        if isinstance(forward_imports, str) or not all(
            isinstance(name, str) and all(part.isidentifier() for part in name.split(".")) for name in forward_imports
        ):
            raise UsageError(f'forward_imports= is a list of names of packages, as in ["mypkg"]; not {forward_imports!r}')
        self.keep = keep == "cache"
        self.forward_imports = list(forward_imports)
        self._modules = collect(modules) if modules is not None else Modules()
        self._requirements = wheels.requirements_of(requirements, lock)
        self._zipapp = _zipapp(zipapp) if zipapp is not None else None
        self._lock = threading.Lock()
        self._forwarded: dict[str, tuple[Bundle, Sequence[str]]] = {}

    def __bool__(self) -> bool:
        return bool(self._modules.files or self._requirements or self.forward_imports or self._zipapp)

    @property
    def names(self) -> frozenset[str]:
        """Modules of this program that the host has then: calls of their functions go by name."""
        return frozenset(self._modules.names | set(self.forward_imports))

    @functools.cached_property
    def _modules_bundle(self) -> Bundle:
        return pack(self._modules.files)

    @functools.cached_property
    def _zipapp_bundle(self) -> Bundle:
        assert self._zipapp is not None
        return pack({self._zipapp.name: Content(self._zipapp)})

    def ship_within(self, timeout_s: float | None, client: Client) -> str:
        """`ship`, with its progress shown and an end: after *timeout_s* seconds the session is given up.

        Raises `PayloadError` then.
        """
        session = client.session
        began = time.monotonic()
        late = PayloadError(f"the payload was not there within {timeout_s or 0:.1f} s", host=session.host)
        timer = threading.Timer(timeout_s, session.fail, [late], {"end": False}) if timeout_s is not None else None
        if timer is not None:
            timer.daemon = True
            timer.start()
        try:
            with Transfer(session.host) as transfer:
                return self.ship(client, transfer.report, None if timeout_s is None else began + timeout_s)
        finally:
            session.phases["payload"] = time.monotonic() - began
            if timer is not None:
                timer.cancel()

    def ship(self, client: Client, progress: Callable[[str, int, int], None] | None = None, until: float | None = None) -> str:
        """Send all of it to one host; gives the zipapp's path there, or nothing. See `shipping.ship` for the errors."""
        path = ""
        for what, bundle, options in self._bundles(client, until):
            report = functools.partial(progress, what) if progress is not None else None
            about = shipping.ship(client, bundle, keep=self.keep, progress=report, **options)
            if options.get("app"):
                path = f"{about['folder']}/{options['app']}"
        if self.forward_imports:
            shipping.allow(client, self.forward_imports, self._forward)
        client.on_host = self.names
        return path

    def _bundles(self, client: Client, until: float | None) -> Iterator[tuple[str, Bundle, dict[str, Any]]]:
        """What goes last comes first on sys.path."""
        if self._requirements:
            facts = vars(client.session.wait_live())["platform"]
            platform = wheels.Platform.of(facts, client.session.host)
            for each in self._requirements:
                yield "wheels", each.bundle(platform, host=client.session.host, until=until), {}
        if self._zipapp is not None:
            with self._lock:
                bundle = self._zipapp_bundle
            yield "zipapp", bundle, {"app": self._zipapp.name}
        if self._modules.files:
            with self._lock:
                bundle = self._modules_bundle
            if bundle.native:
                facts = vars(client.session.wait_live())["platform"]
                self._modules.check_natives(str(facts["abi"]), client.session.host)
            yield "modules", bundle, {"paths": self._modules.paths}

    def _forward(self, name: str) -> tuple[Bundle, Sequence[str]]:
        with self._lock:
            if name not in self._forwarded:
                found = collect([name])
                self._forwarded[name] = pack(found.files), found.paths
            return self._forwarded[name]


def _zipapp(given: str | os.PathLike[str]) -> Path:
    import zipfile

    path = Path(given).expanduser()
    if not path.is_file():
        raise UsageError(f"zipapp={os.fspath(given)!r}: there is no such file")
    if not zipfile.is_zipfile(path):
        raise PayloadError(f"{path} is no zipapp: not a zip archive")
    return path


def payload_of(made: Payload | None, given: dict[str, Any]) -> Payload:
    """*made*, or what the keywords *given* make. Raises as `Payload` does, and `UsageError` for both."""
    if made is None:
        return Payload(**given)
    if not isinstance(made, Payload):
        raise UsageError(f"payload= is a Payload, not {made!r}")
    if given:
        raise UsageError(f"payload= stands in the place of {', '.join(given)}=")
    return made
