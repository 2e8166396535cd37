"""The Beam pipelines. Each module is a thin wrapper around functions of captionlib."""

import logging

# On import, Beam warns about missing Google client libraries, which only Dataflow needs.
logging.disable(logging.WARNING)
import apache_beam  # noqa: E402, F401

logging.disable(logging.NOTSET)
