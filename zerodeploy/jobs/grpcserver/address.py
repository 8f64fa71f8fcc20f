"""Addresses as people write them."""

from __future__ import annotations

__all__ = ["format_address", "parse_address"]


def parse_address(text: str) -> tuple[str, int]:
    """``host:port``, ``[v6]:port`` or ``:port`` (all addresses). Raises ValueError."""
    if "://" in text:
        raise ValueError(f"{text!r} is a URL; host:port is an address, as in localhost:50051")
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"{text!r}: an IPv6 address stands in brackets, as in [::1]:50051")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{text!r} is no address; host:port is one, as in localhost:50051")
    return host, int(port)


def format_address(host: str, port: int) -> str:
    """What `parse_address` reads."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
