"""Prints the summary at the end of a pipeline command."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from captionlib.data.shards.markers import Totals

__all__ = ["print_remaining_cost", "print_totals"]


def print_totals(output: str, totals: Totals) -> None:
    click.echo(f"{output}: {totals.rows:,} rows in {totals.shards:,} shards, {totals.bytes / 1e6:,.1f} MB")
    if totals.failures:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in totals.reasons.items())
        click.echo(
            f"{totals.failures:,} of {totals.images:,} images failed ({reasons}); see {output}/__failures", err=True
        )


def print_remaining_cost(source: str, outputs: Sequence[str], workers: int) -> None:
    """After a run with --limit, prints the estimated time and output size for the remaining images of `source`."""
    from captionlib.data.shards.dataset import open_dataset
    from captionlib.data.shards.sampling import estimate_remaining

    estimate = estimate_remaining(open_dataset(source), [open_dataset(output) for output in outputs], workers)
    if not estimate.images:
        click.echo(f"The sample contained all images of {source} ({estimate.images_per_second:,.1f} images/s)")
        return
    speed = f"{estimate.images_per_second:,.1f} images/s with {workers} {'worker' if workers == 1 else 'workers'}"
    click.echo(
        f"The other {estimate.images:,} images: about {estimate.seconds / 3600:,.2f} hours ({speed}), "
        f"{estimate.bytes / 1e6:,.1f} MB, {estimate.failures:,} failures"
    )
