"""The messages of ``jobs.proto``, made from its descriptor when they are needed.

``jobs.binpb`` is the compiled form of ``jobs.proto`` (a FileDescriptorSet; ``make proto`` writes it). Generated modules are
bound to the protobuf release that they were generated with; a descriptor is not. The pool is our own: whoever has compiled
the same file into the same process is not disturbed.
"""

from __future__ import annotations

import os
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, timestamp_pb2

__all__ = ["METHODS", "PACKAGE", "STATES", "make", "method_path", "type_of"]

PACKAGE = "zerodeploy.jobs.v1"
SERVICE = "JobService"
#: by name: request, answer, whether there are many of these
METHODS = {
    "Start": ("JobRequest", "JobStatus", False),
    "Status": ("StatusRequest", "JobStatus", False),
    "Stop": ("StopRequest", "JobStatus", False),
    "GetOutput": ("GetOutputRequest", "JobOutput", True),
    "GetOuput": ("GetOutputRequest", "JobOutput", True),
    "Signal": ("SignalRequest", "JobStatus", False),
    "List": ("ListRequest", "ListResponse", False),
    "WatchStatus": ("StatusRequest", "JobStatus", True),
}
#: the engine's names of states, at their numbers
STATES = ("", "initial", "running", "stopping", "exited", "signaled", "failed", "lost")


def _load() -> dict[str, Any]:
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(timestamp_pb2.DESCRIPTOR.serialized_pb)
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "jobs.binpb"), "rb") as file:
        described = descriptor_pb2.FileDescriptorSet.FromString(file.read())
    found = {}
    for each in described.file:
        pool.AddSerializedFile(each.SerializeToString())
        for message in each.message_type:
            found[message.name] = message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{message.name}"))
    return found


_types = _load()


def type_of(name: str) -> Any:
    """The class of the message *name*."""
    return _types[name]


def make(name: str, **fields: Any) -> Any:
    """A message with these fields."""
    return _types[name](**fields)


def method_path(name: str) -> str:
    """Where a call of the method goes (gRPC over HTTP/2: ``:path``)."""
    return f"/{PACKAGE}.{SERVICE}/{name}"
