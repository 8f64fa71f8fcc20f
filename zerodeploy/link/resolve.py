"""From what the user passes to a Link."""

from __future__ import annotations

from zerodeploy.link.base import Link
from zerodeploy.link.command import LocalLink
from zerodeploy.link.openssh import OpenSSHLink
from zerodeploy.link.plumbum_machine import ParamikoLink, SshMachineLink, is_plumbum, refuse

__all__ = ["resolve"]


def resolve(machine: object) -> Link:
    """The Link for a host string, a plumbum machine or a Link. Raises `UsageError`; nothing is contacted."""
    if isinstance(machine, Link):
        return machine
    if isinstance(machine, str):
        return OpenSSHLink.to(machine)
    if is_plumbum(machine, "SshMachine"):
        return SshMachineLink(machine)
    if is_plumbum(machine, "ParamikoMachine"):
        return ParamikoLink(machine)
    if is_plumbum(machine, "LocalMachine"):
        return LocalLink()
    raise refuse(machine)
