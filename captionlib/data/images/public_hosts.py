"""An HTTP client that connects only to public hosts.

The client checks the IP address of each connection just before it opens the socket. The check therefore covers
redirects, and host names that resolve to a public address first and to a private address later (DNS rebinding).
"""

import ipaddress
import socket
from collections.abc import Mapping
from typing import Any

import aiohttp
from aiohttp import AddrInfoType

from captionlib.errors import ConfigError

__all__ = ["create_public_client", "is_private_address", "is_private_host_error", "reject_proxies"]

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052: the last four bytes are an IPv4 address


class _PrivateHostError(OSError):
    """A connection to a private host was rejected."""


def is_private_address(host: str) -> bool:
    """Returns whether an IP address is loopback, link-local, private, multicast, reserved, unspecified or malformed."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return True
    if isinstance(address, ipaddress.IPv6Address):
        if (embedded := _extract_ipv4(address)) is not None:
            return is_private_address(str(embedded))
        if address.is_site_local:
            return True
    return not address.is_global or address.is_multicast or address.is_reserved or address.is_unspecified


def _extract_ipv4(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """Returns the IPv4 address that traffic to an IPv6 address actually reaches, or None if there is none."""
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)


def _open_public_socket(address: AddrInfoType) -> socket.socket:
    family, kind, protocol, _, socket_address = address
    if is_private_address(str(socket_address[0])):
        # The message is constant, so that asyncio raises a single error if all IP addresses of a host are rejected.
        raise _PrivateHostError("the host is not public")
    return socket.socket(family, kind, protocol)


async def create_public_client(**options: Any) -> aiohttp.ClientSession:
    """Creates a session for `HTTPFileSystem(get_client=...)`. `options` come from the user's fsspec configuration."""
    connector = aiohttp.TCPConnector(socket_factory=_open_public_socket)
    return aiohttp.ClientSession(**{**options, "connector": connector, "trust_env": False})


def reject_proxies(options: Mapping[str, Any]) -> None:
    """Raises ConfigError if fsspec's HTTP options set a proxy, because a proxy resolves host names itself."""
    client = options.get("client_kwargs") or {}
    if options.get("proxy") or client.get("proxy") or client.get("trust_env"):
        raise ConfigError(
            "private hosts cannot be rejected behind a proxy, which resolves host names itself; expected no proxy and "
            "no trust_env in fsspec's HTTP options; remove these options, or allow private hosts in captionlib "
            "and let the proxy reject them"
        )


def is_private_host_error(error: BaseException | None) -> bool:
    """Returns whether an error is the rejection of a private host, or was caused by it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, _PrivateHostError) or isinstance(getattr(error, "os_error", None), _PrivateHostError):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False
