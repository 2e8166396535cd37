"""Runs the command line: `python -m captionlib`."""

from jobs.cli import main

if __name__ == "__main__":
    main()
