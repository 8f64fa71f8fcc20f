"""What ssh says when a login fails, and what it means. The one place where its words are read.

Messages as OpenSSH 7.4 to 10 print them (sshconnect.c, sshconnect2.c, packet.c, readconf.c), and sshpass.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from zerodeploy.errors import (
    AuthenticationFailed,
    HostError,
    HostKeyMismatch,
    HostKeyUnknown,
    HostUnreachable,
)

__all__ = ["classify", "tail"]

_TABLE: tuple[tuple[str, type[HostError], str], ...] = (
    (r"REMOTE HOST IDENTIFICATION HAS CHANGED|[Hh]ost key .* has changed", HostKeyMismatch,
     "the host shows another key than {file} has for it. If that is expected (reinstalled, new address): {mend}; if not, "
     "somebody may be in between"),
    (r"Host key verification failed|No \S+ host key is known|Host public key is unknown|detected host authentication prompt",
     HostKeyUnknown,
     "the host's key is not in {file}. Log in once by hand (ssh {target}) and compare it, or: {learn}"),
    (r"Permission denied \(|Too many authentication failures|No more authentication methods|Permission denied, please",
     AuthenticationFailed,
     "the login was refused. Try: ssh {target}; look at user name, key file (ssh -v) and the agent (ssh-add -l)"),
    (r"sshpass: .*", AuthenticationFailed, "sshpass could not log in"),
    (r"Could not resolve hostname|Name or service not known|nodename nor servname", HostUnreachable,
     "the name does not resolve. Is it spelled right, is it an alias of another ssh_config?"),
    (r"Connection refused", HostUnreachable, "nothing listens there. Is sshd running, is the port right?"),
    (r"Connection timed out|Operation timed out|timed out during banner|Timeout, server", HostUnreachable,
     "no answer within {waited:.1f} s"),
    (r"No route to host|Network is unreachable|Host is down", HostUnreachable, "there is no way to it from here"),
    (r"Connection (closed|reset)|kex_exchange_identification|ssh_exchange_identification|Broken pipe|Connection to .* closed",
     HostUnreachable, "the host closed the connection before the login was done (too many logins at once? fail2ban?)"),
    (r"no matching (host key|key exchange|cipher|MAC)|Unable to negotiate", HostUnreachable,
     "client and host share no algorithm"),
    (r"Bad configuration option|Bad owner or permissions|terminating, \d+ bad configuration|unknown option|usage: ssh",
     HostError, "ssh did not accept its configuration or options"),
    (r"UNPROTECTED PRIVATE KEY|bad permissions|Load key", AuthenticationFailed, "the key file can't be used"),
)  # fmt: skip


def tail(text: str, lines: int = 6) -> str:
    """The last lines of a stderr, for an error message."""
    kept = [line.rstrip() for line in text.splitlines() if line.strip()]
    return "\n".join(kept[-lines:])


def classify(stderr: str, *, host: str, target: str, waited_s: float,
             settings: Callable[[], dict[str, str]] = dict) -> HostError | None:  # fmt: skip
    """The error that *stderr* of a failed ssh stands for, or None when it is not one of ssh's own.

    *settings* gives what ``ssh -G`` prints for the host; it is asked only where a message needs it.
    """
    for pattern, cls, advice in _TABLE:
        if re.search(pattern, stderr):
            file, mend = _known_hosts(stderr, target)
            learn = _learn(stderr, target)
            if cls is HostKeyUnknown and (known := settings()):
                file, learn = _learn_by(known)
            text = advice.format(target=target, waited=waited_s, file=file, mend=mend, learn=learn)
            return cls(f"{text}{'' if text.endswith('?') else '.'} ssh said: {tail(stderr, 4)}", host=host, stderr=tail(stderr, 30))
    return None


def _known_hosts(stderr: str, target: str) -> tuple[str, str]:
    """The known_hosts file that ssh named, and the command that mends the entry."""
    offending = re.search(r"(?:Offending .*key in|offending key in) (\S+?):(\d+)", stderr)
    file = offending[1] if offending else "~/.ssh/known_hosts"
    mend = re.search(r'ssh-keygen -f "[^"]+" -R "[^"]+"', stderr)
    return file, mend[0] if mend else f"ssh-keygen -f {file} -R {_bare(target)}"


def _learn_by(settings: dict[str, str]) -> tuple[str, str]:
    """The file that ssh would look in and the command that adds the key to it, as ssh's settings have them."""
    file = (settings.get("userknownhostsfile") or "~/.ssh/known_hosts").split()[0]
    scan = f"ssh-keyscan -p {settings.get('port', '22')} {settings.get('hostname', '')}"
    alias = settings.get("hostkeyalias")
    return file, f"{scan} | sed 's/^[^ ]* /{alias} /' >> {file}" if alias else f"{scan} >> {file}"


def _bare(target: str) -> str:
    return target.rpartition("@")[2]


def _learn(stderr: str, target: str) -> str:
    """The command that fetches the key: with the port, where ssh named it."""
    bracketed = re.search(r"\[([^\]\s]+)\]:(\d+)", stderr)
    where = f"-p {bracketed[2]} {bracketed[1]}" if bracketed else _bare(target)
    return f"ssh-keyscan {where} >> ~/.ssh/known_hosts"
