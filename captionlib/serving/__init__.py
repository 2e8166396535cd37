"""Web application for searching an index, with HTML pages and a JSON API."""
