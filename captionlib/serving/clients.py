"""Identifies clients by their network address."""

import ipaddress

from starlette.types import Scope

__all__ = ["identify_client"]


def identify_client(scope: Scope) -> str:
    """Returns the network address of a client. Of an IPv6 address, only the network part counts.

    A client usually has a whole IPv6 network of 2^64 addresses, and could otherwise appear as many clients.
    """
    host: str = (scope.get("client") or ("", 0))[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # such as a Unix socket
        return host
    if isinstance(address, ipaddress.IPv4Address):
        return host
    if address.ipv4_mapped is not None:  # the form of IPv4 clients if the server listens on ::
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))
