"""How commands say what they have done."""

import click

from captionlib.data.shards.markers import Totals
from captionlib.evaluation.retrieval import RankingScores

__all__ = ["echo_ranking", "echo_totals"]


def echo_totals(output: str, totals: Totals) -> None:
    """Prints where the rows are, how many, and what failed why."""
    click.echo(f"{output}: {totals.rows:,} rows in {totals.shards:,} shards, {totals.bytes / 1e6:,.1f} MB")
    if totals.failures:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in totals.reasons.items())
        click.echo(
            f"{totals.failures:,} of {totals.images:,} images failed ({reasons}); see {output}/_failures", err=True
        )


def echo_ranking(ranker: str, scores: RankingScores) -> None:
    """Prints how well a ranker ranks, a line each direction."""
    folds = f", the mean of {scores.folds} folds" if scores.folds > 1 else ""
    click.echo(f"{ranker}: {scores.images:,} images, {scores.sentences:,} sentences{folds}")
    click.echo(f"  {'':<17} {'R@1':>6} {'R@5':>6} {'R@10':>6} {'median':>7} {'mean':>7}")
    for name, one in (("image to sentence", scores.image_to_sentence), ("sentence to image", scores.sentence_to_image)):
        recalls = f"{one.recall_at_1:>6.1%} {one.recall_at_5:>6.1%} {one.recall_at_10:>6.1%}"
        click.echo(f"  {name:<17} {recalls} {one.median_rank:>7.1f} {one.mean_rank:>7.1f}")
