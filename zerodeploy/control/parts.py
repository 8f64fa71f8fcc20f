"""Engines that follow over the link when they are first asked for."""

from __future__ import annotations

from zerodeploy.control.client import Client

__all__ = ["install"]


def install(client: Client, packed: bytes) -> None:
    """Send an engine's sources (`payload.agent.jobs_part` and its kin). Raises `LinkLost`."""
    client.session.ship_late_part()
    client.call("zerodeploy_agent.relay:install", (packed,), {})
