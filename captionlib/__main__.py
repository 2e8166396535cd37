"""Runs the command line: `python -m captionlib`."""

from jobs.cli import run_program

if __name__ == "__main__":
    run_program()
