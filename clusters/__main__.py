"""Starts and stops clusters: `make cluster-up ENGINE=flink`, `make cluster-down`."""

import sys
from pathlib import Path

import click
import yaml

from clusters.engines import ENGINES, cluster_of
from clusters.packages import CACHE
from clusters.processes import ClusterError

RUN = CACHE / "run"


@click.group()
def clusters() -> None:
    """Clusters of real processes on this machine's loopback interface, from packages, without Docker."""


@clusters.command()
@click.argument("engine", type=click.Choice(list(ENGINES)))
def up(engine: str) -> None:
    """Fetch what is missing, start a cluster of ENGINE, and say how to submit to it."""
    cluster = cluster_of(engine, RUN / engine)
    cluster.start()
    options = RUN / f"{engine}.yaml"
    options.write_text(yaml.safe_dump(cluster.beam_options, sort_keys=False), encoding="utf-8")
    shown = options.relative_to(Path.cwd()) if options.is_relative_to(Path.cwd()) else options
    click.echo(f"{engine} is up: {', '.join(cluster.processes.names())}{_seen_at(cluster.address)}")
    click.echo(f"captionlib extract-features manifest -o features -- @{shown}")


@clusters.command()
def down() -> None:
    """Stop every cluster that `up` started, workers included."""
    for engine in ENGINES:
        for name in cluster_of(engine, RUN / engine).stop():
            click.echo(f"{engine}: stopped {name}")


def _seen_at(address: str | None) -> str:
    return f"; {address} in a browser" if address else ""


if __name__ == "__main__":
    try:
        clusters(standalone_mode=False)
    except (ClusterError, click.ClickException) as error:
        sys.exit(f"Error: {error}")
