"""Prints the summary at the end of a pipeline command."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from captionlib.data.shards.markers import Totals

__all__ = ["echo_totals"]


def echo_totals(output: str, totals: Totals) -> None:
    """Prints the output folder, its numbers of rows and shards, its size, and the number of failures by reason."""
    click.echo(f"{output}: {totals.rows:,} rows in {totals.shards:,} shards, {totals.bytes / 1e6:,.1f} MB")
    if totals.failures:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in totals.reasons.items())
        click.echo(
            f"{totals.failures:,} of {totals.images:,} images failed ({reasons}); see {output}/__failures", err=True
        )
