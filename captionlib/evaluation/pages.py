"""Renders HTML pages from templates. Values are escaped, and the templates load nothing from other servers."""

import re
from datetime import datetime, timezone
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from captionlib.data.shards.markers import parse_time

__all__ = ["create_environment", "read_asset", "render_page"]


def create_environment(package: str) -> Environment:
    """Creates a Jinja environment for the templates in the folder `templates/` of a package."""
    return Environment(
        loader=PackageLoader(package), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def render_page(template: str, **values: Any) -> bytes:
    """Renders a template from `templates/` and returns the page in UTF-8."""
    environment = create_environment("captionlib.evaluation")
    filters = {"duration": _format_duration, "size": _format_size, "time": _format_time, "words": _split_words}
    environment.filters.update(filters)
    return environment.get_template(template).render(**values).encode()


def read_asset(name: str) -> bytes:
    """Reads a style sheet or script from `templates/`, for a server that sends it as a file."""
    return (files("captionlib.evaluation") / "templates" / name).read_bytes()


def _format_duration(seconds: float) -> str:
    """Formats a duration in at most two units, such as `2 h 5 min`."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"


def _format_size(size: float) -> str:
    """Formats a number of bytes with a decimal unit, such as `8.1 MB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


def _format_time(time: str | float) -> str:
    """Formats an ISO 8601 time or a Unix time in UTC, such as `1 June 2026, 12:00 UTC`."""
    moment = datetime.fromtimestamp(parse_time(time) if isinstance(time, str) else time, timezone.utc)
    return f"{moment.day} {moment:%B %Y, %H:%M} UTC"


def _split_words(category: str) -> str:
    """Splits the category of an error into words: `NotFound` becomes `Not found`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", category).capitalize()
