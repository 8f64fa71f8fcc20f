"""The life of a session as tables, one per end. Pure: message in, state out; a missing cell is a `StateError`.

::

    client   CONNECTING -Greeting-> GREETED -Live-> LIVE -Terminate-> CLOSING -Terminated-> CLOSED
    keeper   WAITING -Session-> LIVE -Terminate-> CLOSING -> CLOSED
"""

from __future__ import annotations

CONNECTING, GREETED, WAITING, LIVE, CLOSING, CLOSED = "connecting", "greeted", "waiting", "live", "closing", "closed"

PEER_LOST = "peer_lost"

_CHATTER = ("pong", "state", "dropped", "error")

CLIENT = {
    CONNECTING: {"greeting": GREETED, "stage_failed": CLOSED, PEER_LOST: CLOSED},
    GREETED: {"live": LIVE, "stage_failed": CLOSED, "worker_died": CLOSING, "error": GREETED, "pong": GREETED,
              "dropped": GREETED, "terminated": CLOSED, "terminating": GREETED, PEER_LOST: CLOSED},
    LIVE: {"worker_died": CLOSING, "terminating": CLOSING, "terminated": CLOSED, PEER_LOST: CLOSED,
           **{name: LIVE for name in _CHATTER}},
    CLOSING: {"worker_died": CLOSING, "terminating": CLOSING, "terminated": CLOSED, PEER_LOST: CLOSED, "live": CLOSING,
              **{name: CLOSING for name in _CHATTER}},
    CLOSED: {PEER_LOST: CLOSED},
}  # fmt: skip

KEEPER = {
    WAITING: {"session": LIVE, "terminate": CLOSING, PEER_LOST: CLOSED},
    LIVE: {"ping": LIVE, "inspect": LIVE, "terminate": CLOSING, PEER_LOST: CLOSED, "worker_lost": CLOSING},
    CLOSING: {"ping": CLOSING, "inspect": CLOSING, "terminate": CLOSING, PEER_LOST: CLOSED, "worker_lost": CLOSING},
    CLOSED: {PEER_LOST: CLOSED},
}


class StateError(Exception):
    """An event that must not happen in this state."""


def advance(table: dict[str, dict[str, str]], state: str, event: str) -> str:
    """The state after *event*. Raises `StateError` where the table has no cell."""
    after = table[state].get(event)
    if after is None:
        raise StateError("%r is not expected in state %r" % (event, state))
    return after
