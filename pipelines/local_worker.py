"""The worker process of `--workers N`: Beam's worker with less logging."""

import json
import logging
import os
import sys

from apache_beam.runners.worker import sdk_worker_main


def main() -> None:
    """Runs Beam's worker with the options in the environment and a higher log level."""
    options = json.loads(os.environ.get("PIPELINE_OPTIONS") or "{}")
    os.environ["PIPELINE_OPTIONS"] = json.dumps({"default_sdk_harness_log_level": "ERROR", **options})
    logging.getLogger(sdk_worker_main.__name__).setLevel(logging.ERROR)
    sdk_worker_main.main(sys.argv)


if __name__ == "__main__":
    main()
