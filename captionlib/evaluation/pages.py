"""Renders HTML pages from templates. Values are escaped, and the templates load nothing from other servers."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

__all__ = ["render_page"]


def render_page(template: str, **values: Any) -> bytes:
    """Renders a template from `templates/` and returns the page in UTF-8."""
    environment = Environment(
        loader=PackageLoader("captionlib.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values).encode()
