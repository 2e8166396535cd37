"""Renders HTML pages from templates. Values are escaped, and the templates load nothing from other servers."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

__all__ = ["create_environment", "render_page"]


def create_environment(package: str) -> Environment:
    """Creates a Jinja environment for the templates in the folder `templates/` of a package."""
    return Environment(
        loader=PackageLoader(package), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def render_page(template: str, **values: Any) -> bytes:
    """Renders a template from `templates/` and returns the page in UTF-8."""
    return create_environment("captionlib.evaluation").get_template(template).render(**values).encode()
