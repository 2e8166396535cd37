"""Templates of the pages that show results: everything is escaped, and nothing is fetched from elsewhere."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

__all__ = ["render_page"]


def render_page(template: str, **values: Any) -> bytes:
    """A page of `templates/`, as UTF-8."""
    environment = Environment(
        loader=PackageLoader("captionlib.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values).encode()
