"""`captionlib query`."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import pyarrow as pa

import captionlib.search
from captionlib.errors import ConfigError
from captionlib.search.index_folder import DESCRIPTION
from captionlib.search.output import OutputFormat
from captionlib.search.sql.queries import count_words, find_captions, find_image, find_top_captions
from captionlib.search.sql.session import SqlLimits, SqlSession, open_sql
from captionlib.storage.folders import Folder
from jobs.rows import first_rows, print_rows, save_rows

__all__ = ["command"]

_LIMIT = 20  # of an index, where nothing else is said


@dataclass(frozen=True)
class _Asked:
    """What was given on the command line, of a dataset or of an index."""

    sql: str | None
    image_id: str | None
    contains: str | None
    top: int | None
    words: int | None
    text: str | None
    sentence: str | None
    hybrid: str | None
    image: str | None
    similar: str | None
    where: str | None
    sort: str
    limit: int | None
    ranker: str | None
    captioner: str | None
    weights: str | None
    sentences: str | None

    def one_of(self, names: Sequence[str]) -> str:
        """The one of these questions that was asked."""
        options = {
            "words": "--count-words",
            **{name: f"--{name.replace('_', '-')}" for name in names if name != "words"},
        }
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            got = " and ".join(options[name] for name in given) or "none"
            *most, last = (options[name] for name in names)
            raise click.UsageError(f"expected one of {', '.join(most)} and {last}, got {got}; ask one at a time.")
        return given[0]

    def refuse(self, names: Sequence[str], kind: str) -> None:
        """Complains of options that are for something else."""
        for name in names:
            if getattr(self, name) is not None:
                raise click.UsageError(f"--{name.replace('_', '-')} is for {kind}.")


_DATASET_QUESTIONS = ("sql", "image_id", "contains", "top", "words")
_INDEX_QUESTIONS = ("text", "sentence", "hybrid", "image", "similar", "image_id")


@click.command()
@click.argument("folder")
@click.option("--text", metavar="WORDS", help='Index: captions by their words; "phrases", +must and -must not.')
@click.option("--sentence", metavar="SENTENCE", help="Index: images that a sentence describes; needs --ranker.")
@click.option("--hybrid", metavar="WORDS", help="Index: by words and as a sentence, fused; needs --ranker.")
@click.option("--image", metavar="FILE", help="Index: images like a photograph of your own; needs --ranker.")
@click.option("--similar", metavar="ID", help="Index: images like one of its own.")
@click.option("--image-id", metavar="ID", help="Everything about one image.")
@click.option("--sql", metavar="SELECT", help="Dataset: any one SELECT; the rows are a view named by its kind.")
@click.option("--contains", metavar="WORDS", help="Dataset: captions with all of these words; the most likely first.")
@click.option("--top", type=click.IntRange(min=1), metavar="N", help="Dataset: the N most likely captions.")
@click.option("--count-words", "words", type=click.IntRange(min=1), metavar="N", help="Dataset: the N most frequent.")
@click.option("--where", metavar="CONDITION", help="Index: of SQL, such as \"split = 'val' AND log_prob > -10\".")
@click.option("--sort", type=click.Choice(["relevance", "log_prob"]), default="relevance", help="Order of --text.")
@click.option("--ranker", "-r", metavar="FOLDER", help="The ranker that made the embeddings of the index.")
@click.option("--captioner", "-c", metavar="FOLDER", help="With --image: what this captioner says of it.")
@click.option("--sentences", metavar="FILE", help="With --image: which of these sentences, one a line, fit it best.")
@click.option("--weights", metavar="FILE", help="The encoder's weights, where they are a file of your own.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "csv", "jsonl", "parquet"]),
    default="table",
    show_default=True,
    help="A table fits the terminal; the others hold every value whole.",
)
@click.option("--output", "-o", metavar="FILE", help="Where to write, in place of the terminal; may be an address.")
@click.option("--limit", type=click.IntRange(min=0), metavar="N", help="At most N rows; 20 of an index, unless given.")
@click.option(
    "--memory", default=SqlLimits.memory, show_default=True, help="What DuckDB may hold before it uses the disk."
)
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="One a core, unless given.")
def command(
    folder: str, form: OutputFormat, output: str | None, memory: str, threads: int | None, **options: str | int | None
) -> None:
    """Ask FOLDER a question: an index, captions, or any other dataset.

    An index takes words, sentences and images. What it finds can be narrowed by a condition over image_id, uri, split,
    caption, log_prob and tokens; as many rows are found as were asked for, unless no more exist. An index that lies
    elsewhere is copied to this machine once.

    A dataset takes SQL: its rows are a view named by what they are (captions, features, manifest, embeddings), and the
    images that failed are the view `failures`. Shards that are still being written are not seen. The dataset can only
    be read, and nothing outside it can be reached, so SQL of strangers is safe to run.

    \b
    Examples:
      captionlib query index --text "dog catching a frisbee"
      captionlib query index --text '+dog "on the beach" -cat' --where "split = 'val'" --limit 50
      captionlib query index --sentence "two men on a beach" --ranker ranker
      captionlib query index --hybrid "a red bus" --ranker ranker --format jsonl
      captionlib query index --similar 391895
      captionlib query index --image photo.jpg --ranker ranker
      captionlib query index --image photo.jpg --ranker ranker --sentences sentences.txt
      captionlib query index --image photo.jpg --captioner captioner
      captionlib query captions --contains "dog frisbee"
      captionlib query captions --image-id 391895
      captionlib query captions --top 20 --format csv --output top.csv
      captionlib query captions --count-words 50
      captionlib query captions --sql "DESCRIBE captions"
      captionlib query captions --sql "SELECT caption, count(*) AS n FROM captions GROUP BY 1 ORDER BY n DESC LIMIT 10"
      captionlib query captions --sql "SELECT image_id, unnest(candidates, recursive := true) FROM captions" --limit 20
      captionlib query captions --sql "SELECT error, count(*) FROM failures GROUP BY 1"
      captionlib query s3://bucket/captions --sql "FROM captions" --format parquet --output all.parquet
    """
    asked = _Asked(**options)  # type: ignore[arg-type]  # click has checked them
    if form == "parquet" and output is None and sys.stdout.isatty():
        raise click.UsageError("Parquet is no text: give --output FILE, or send it into a pipe.")
    with _answer(folder, asked, SqlLimits(memory, threads)) as rows:
        if output is None:
            print_rows(rows, form)
        else:
            count = save_rows(rows, form, output)
            click.echo(f"{output}: {count:,} rows")


@contextmanager
def _answer(folder: str, asked: _Asked, limits: SqlLimits) -> Iterator[pa.RecordBatchReader]:
    if Folder(folder).exists(DESCRIPTION):
        asked.refuse(["sql", "contains", "top", "words"], "datasets; ask the captions that the index was built from")
        yield _ask_index(folder, asked).to_reader()
        return
    of_indexes = ["text", "sentence", "hybrid", "image", "similar", "where"]
    asked.refuse(of_indexes, f"an index, and {folder} holds none; see `captionlib build-index`")
    question = _dataset_question(asked)
    with open_sql(folder, limits=limits) as session:
        rows = question(session)
        yield rows if asked.limit is None else first_rows(rows, asked.limit)


def _dataset_question(asked: _Asked) -> Callable[[SqlSession], pa.RecordBatchReader]:
    name = asked.one_of(_DATASET_QUESTIONS)
    questions: dict[str, Callable[[SqlSession], pa.RecordBatchReader]] = {
        "sql": lambda session: session.stream(asked.sql or ""),
        "image_id": lambda session: find_image(session, asked.image_id or "").to_reader(),
        "contains": lambda session: find_captions(session, asked.contains or ""),
        "top": lambda session: find_top_captions(session, asked.top or 0),
        "words": lambda session: count_words(session, asked.words or 0),
    }
    return questions[name]


def _ask_index(folder: str, asked: _Asked) -> pa.Table:
    name = asked.one_of(_INDEX_QUESTIONS)
    if asked.image is not None:
        return _ask_about_image(folder, asked, asked.image)
    limit = _LIMIT if asked.limit is None else asked.limit
    ranker = asked.ranker if name in ("sentence", "hybrid") else None
    if name in ("sentence", "hybrid") and ranker is None:
        raise click.UsageError(f"--{name} needs --ranker FOLDER: the ranker that made the embeddings of the index.")
    index = captionlib.search.open(folder, ranker)
    questions: dict[str, Callable[[], pa.Table]] = {
        "text": lambda: index.search_text(asked.text or "", limit, where=asked.where, sort=asked.sort),  # type: ignore[arg-type]
        "sentence": lambda: index.search_sentence(asked.sentence or "", limit, where=asked.where),
        "hybrid": lambda: index.search_hybrid(asked.hybrid or "", limit, where=asked.where),
        "similar": lambda: index.search_similar(asked.similar or "", limit, where=asked.where),
        "image_id": lambda: pa.Table.from_pylist([index.get_image(asked.image_id or "")]),
    }
    return questions[name]()


def _ask_about_image(folder: str, asked: _Asked, image: str) -> pa.Table:
    from captionlib.data.images.fetching import ImageFetcher
    from captionlib.search.models import (
        ImageQueryModels,
        load_query_encoder,  # these load torch, which takes seconds
    )

    if asked.captioner is None and asked.ranker is None:
        raise click.UsageError("--image needs --ranker FOLDER, to find images like it, or --captioner FOLDER.")
    if asked.captioner is not None and asked.sentences is not None:
        raise click.UsageError("expected one of --captioner and --sentences, got both; ask one at a time.")
    limit = _LIMIT if asked.limit is None else asked.limit
    sentences = None if asked.sentences is None else _read_sentences(asked.sentences)
    ranker = load_query_encoder(asked.ranker) if asked.ranker and asked.captioner is None else None
    index = None if ranker is None or sentences is not None else captionlib.search.open(folder, ranker)
    with ImageFetcher() as fetcher, ImageQueryModels(ranker, asked.captioner, asked.weights) as photos:
        content = fetcher.fetch(image)
        if asked.captioner is not None:
            return photos.caption(content).slice(0, limit)
        vector = photos.embed(content)
        if ranker is not None and sentences is not None:
            return photos.rank_sentences(vector, sentences).slice(0, limit)
    assert index is not None
    return index.search_vector(vector, limit, where=asked.where)


def _read_sentences(file: str) -> list[str]:
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--sentences {file}: cannot be read: {error}") from error
    return [line.strip() for line in lines if line.strip()]
