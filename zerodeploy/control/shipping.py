"""Bundles on their way to one host."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

from zerodeploy_agent import messages, plain
from zerodeploy_agent.frames import ChannelError
from zerodeploy_agent.messages import WORKER_CHANNEL

from zerodeploy.control.client import Client
from zerodeploy.errors import LinkLost, NotShippable, PayloadError, ZeroDeployError
from zerodeploy.payload.bundles import Bundle

__all__ = ["allow", "ship"]

_log = logging.getLogger("zerodeploy")


def ship(client: Client, bundle: Bundle, *, paths: Sequence[str] = ("",), keep: bool = False, app: str = "", name: str = "",
         progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:  # fmt: skip
    """Unpack *bundle* in the host's private dir and make *paths* of it importable there.

    Args:
        keep: leave the bundle in the user's cache on the host, and take it from there if it is.
        app: the bundle is one file of this name, a zipapp; what is in it becomes importable.
        name: of the package that the host has asked for.
        progress: called with the bytes that are under way and all of them.

    Returns: ``folder``: where it is on the host; ``from_cache``: whether nothing had to be sent.

    Raises:
        PayloadError: the host has no room for it, can't load C extensions from there, or it is no zipapp. What was unpacked
            is gone again.
        LinkLost: the session is over.
    """
    session = client.session
    before = client.bundles.get((bundle.sha256, app))
    if before is not None and not name:
        return before
    session.ship_late_part()
    request, number, reply = session.next_request()
    channel = session.channels.open(number)
    try:
        session.tell(
            WORKER_CHANNEL,
            messages.Unpack(
                id=request, channel=number, key=bundle.sha256, size=bundle.size, raw=bundle.raw, paths=list(paths),
                native=bundle.native, keep=keep, app=app, name=name,
            ),
        )  # fmt: skip
        try:
            if not keep or channel.read_exactly(1) == b"n":
                sent = 0
                for piece in bundle.pieces():
                    channel.write(piece)
                    sent += len(piece)
                    if progress is not None:
                        progress(sent, bundle.size)
            channel.end()
        except ChannelError:
            pass  # the answer says why
        except BaseException:
            with contextlib.suppress(ChannelError):
                channel.close("the client gave up")
            raise
        answer = reply.wait()
    finally:
        session.channels.forget(number)
        session.finish(request)
    if not isinstance(answer, messages.Result):
        error = client._error(answer)
        if isinstance(error, NotShippable):
            raise PayloadError(str(error.args[0]), host=session.host)
        raise PayloadError(f"the payload could not be unpacked: {error.args[0]}", host=session.host) from error
    about: dict[str, Any] = plain.unpack(vars(answer)["body"], [])  # type: ignore[assignment]
    if about["not_kept"]:
        _log.warning("%s: the payload was not kept there: %s", session.host, about["not_kept"])
    client.bundles[bundle.sha256, app] = about
    return about


def allow(client: Client, names: Sequence[str], provide: Callable[[str], tuple[Bundle, Sequence[str]]]) -> None:
    """Let the host ask for the packages *names* when it imports them. *provide* gives a package's bundle and paths.

    Raises `LinkLost`. What *provide* raises is logged, and the import fails on the host.
    """
    session = client.session

    def answer(name: str) -> None:
        try:
            if name in names:
                bundle, paths = provide(name)
                if (bundle.sha256, "") not in client.bundles:
                    ship(client, bundle, paths=paths, name=name)  # which the host takes for the answer
                    return
            else:
                _log.warning("%s: asked for %r, which forward_imports= does not allow", session.host, name)
        except LinkLost:
            return
        except ZeroDeployError as error:
            _log.warning("%s: %r can't be forwarded: %s", session.host, name, error)
        with contextlib.suppress(ZeroDeployError):
            session.tell(WORKER_CHANNEL, messages.Came(name=name))

    session.ship_late_part()
    session.provide = answer
    request, _, reply = session.next_request()
    try:
        session.tell(WORKER_CHANNEL, messages.Allow(id=request, names=list(names)))
        reply.wait()
    finally:
        session.finish(request)
