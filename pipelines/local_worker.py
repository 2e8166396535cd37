"""Runs a worker process for `--workers N`: Beam's SDK worker with a higher log level."""

import json
import logging
import os
import sys

from apache_beam.runners.worker import sdk_worker_main


def main() -> None:
    """Runs Beam's worker with the options from the environment, and logs only errors."""
    options = json.loads(os.environ.get("PIPELINE_OPTIONS") or "{}")
    os.environ["PIPELINE_OPTIONS"] = json.dumps({"default_sdk_harness_log_level": "ERROR", **options})
    logging.getLogger(sdk_worker_main.__name__).setLevel(logging.ERROR)
    sdk_worker_main.main(sys.argv)


if __name__ == "__main__":
    main()
