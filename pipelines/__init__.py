"""The only Beam code: one file a pipeline, thin over captionlib."""

import logging

# On import Beam warns of Google's client libraries, which nobody needs who does not go to Dataflow.
logging.disable(logging.WARNING)
import apache_beam  # noqa: E402, F401

logging.disable(logging.NOTSET)
