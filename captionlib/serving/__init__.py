"""The index as a web application: pages for people, JSON for programs."""
