"""The Beam pipelines. Each module is a thin wrapper around functions of captionlib."""

import logging
import os

# Beam's threads call gRPC all the time. gRPC's fork handlers do not support that and may abort a forked child.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

# On import, Beam warns about missing Google client libraries, which only Dataflow needs.
logging.disable(logging.WARNING)
import apache_beam  # noqa: E402, F401

logging.disable(logging.NOTSET)
