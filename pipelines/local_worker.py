"""Runs a worker process for `--workers N`: Beam's SDK worker, which stops when the run stops."""

import json
import logging
import os
import sys
import threading
import time
from pathlib import Path

from apache_beam.runners.worker import sdk_worker_main

_POLL_SECONDS = 0.2


def main() -> None:
    """Runs Beam's worker. The argument is the path of a file that the parent process removes to stop its workers."""
    threading.Thread(target=_exit_when_run_stops, args=(Path(sys.argv[1]), os.getppid()), daemon=True).start()
    options = json.loads(os.environ.get("PIPELINE_OPTIONS") or "{}")
    os.environ["PIPELINE_OPTIONS"] = json.dumps({"default_sdk_harness_log_level": "CRITICAL", **options})
    logging.getLogger(sdk_worker_main.__name__).setLevel(logging.CRITICAL)
    sdk_worker_main.main(sys.argv)


def _exit_when_run_stops(run_file: Path, parent: int) -> None:
    while run_file.exists() and os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    os._exit(0)


if __name__ == "__main__":
    main()
