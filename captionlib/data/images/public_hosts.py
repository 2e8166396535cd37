"""An HTTP client that connects to public hosts only.

The check is made on the address of each connection just before it is opened: after the name is resolved, for IP
literals, and again for every redirect. A name that resolves to another address the second time is no way around it.
"""

import ipaddress
import socket
from collections.abc import Mapping
from typing import Any

import aiohttp
from aiohttp import AddrInfoType

from captionlib.errors import ConfigError

__all__ = ["PrivateHostError", "create_public_client", "is_private", "is_refusal", "refuse_proxies"]

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052: the last four bytes are an IPv4 address


class PrivateHostError(OSError):
    """A connection to a host that is not public was refused.

    Its message is always the same: where several addresses of a name fail alike, asyncio raises the first error.
    """

    def __init__(self) -> None:
        super().__init__("the host is not public")


def is_private(host: str) -> bool:
    """Whether an IP address is anything but a public host: loopback, link-local, private, multicast, reserved ...

    Args:
        host: an IP address as a socket takes it. What is not in canonical form counts as private.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return True
    if isinstance(address, ipaddress.IPv6Address):
        embedded = _embedded(address)
        if embedded is not None:
            return is_private(str(embedded))
        if address.is_site_local:
            return True
    return not address.is_global or address.is_multicast or address.is_reserved or address.is_unspecified


def _embedded(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that a gateway or the operating system connects to instead."""
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)


def _open_public_socket(address: AddrInfoType) -> socket.socket:
    family, kind, protocol, _, target = address
    if is_private(str(target[0])):
        raise PrivateHostError
    return socket.socket(family, kind, protocol)


async def create_public_client(**options: Any) -> aiohttp.ClientSession:
    """A session for `HTTPFileSystem(get_client=...)`, with the other options that the user configured."""
    connector = aiohttp.TCPConnector(socket_factory=_open_public_socket)
    return aiohttp.ClientSession(**{**options, "connector": connector, "trust_env": False})


def refuse_proxies(options: Mapping[str, Any]) -> None:
    """Refuses fsspec options of `http` that send requests through a proxy, which would resolve the names itself.

    Raises:
        ConfigError: there is a proxy.
    """
    client = options.get("client_kwargs") or {}
    if options.get("proxy") or client.get("proxy") or client.get("trust_env"):
        raise ConfigError(
            "private hosts cannot be refused behind a proxy, which resolves host names itself; expected no proxy and "
            "no trust_env in fsspec's options of http; remove them, or allow private hosts and let the proxy refuse "
            "them"
        )


def is_refusal(error: BaseException | None) -> bool:
    """Whether an error is, or was caused by, a refused connection."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, PrivateHostError) or isinstance(getattr(error, "os_error", None), PrivateHostError):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False
