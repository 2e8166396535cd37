"""Starts and stops clusters: `make cluster-up ENGINE=flink`, `make cluster-down`."""

import sys
from pathlib import Path

import click
import yaml

from clusters.engines import ENGINES
from clusters.packages import CACHE
from clusters.processes import ClusterError

RUN = CACHE / "run"


@click.group()
def clusters() -> None:
    """Run clusters of local processes on the loopback interface, without Docker."""


@clusters.command()
@click.argument("engine", type=click.Choice(list(ENGINES)))
def up(engine: str) -> None:
    """Install ENGINE if necessary, start a cluster, and print how to submit to it."""
    cluster = ENGINES[engine](RUN / engine)
    cluster.start()
    options = RUN / f"{engine}.yaml"
    options.write_text(yaml.safe_dump(cluster.beam_options, sort_keys=False), encoding="utf-8")
    path = options.relative_to(Path.cwd()) if options.is_relative_to(Path.cwd()) else options
    click.echo(f"{engine} is up: {', '.join(cluster.processes.list_names())}; web interface at {cluster.web_address}")
    click.echo(f"captionlib extract-features manifest -o features -- @{path}")


@clusters.command()
def down() -> None:
    """Stop every cluster that `up` started, including its workers."""
    for engine in ENGINES:
        for name in ENGINES[engine](RUN / engine).stop():
            click.echo(f"{engine}: stopped {name}")


if __name__ == "__main__":
    try:
        clusters(standalone_mode=False)
    except (ClusterError, click.ClickException) as error:
        sys.exit(f"Error: {error}")
