"""Identifies clients by their IP address."""

import ipaddress

from starlette.types import Scope

__all__ = ["identify_client"]


def identify_client(scope: Scope) -> str:
    """Returns the IPv4 address or the IPv6 network (/64) of a client.

    An IPv6 client usually has a network of 2^64 addresses, and could send each request from a different address.
    """
    host: str = (scope.get("client") or ("", 0))[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # not an IP address, such as with a Unix socket
        return host
    if isinstance(address, ipaddress.IPv4Address):
        return host
    if address.ipv4_mapped is not None:  # an IPv4 client of a server that listens on ::
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))
