"""The web application over an index: HTML pages and a JSON API."""
