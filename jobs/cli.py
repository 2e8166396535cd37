"""The command line. Each command is a thin layer over the library, in a module that is imported on demand."""

import importlib
import sys

import click

from captionlib import __version__
from captionlib.errors import CaptionlibError, TrainingInterrupted

__all__ = ["captionlib", "main"]

# Groups of commands in workflow order, with the summary of each command for `captionlib --help`.
COMMANDS: dict[str, dict[str, str]] = {
    "Start here": {
        "demo": "Run the whole workflow on synthetic images, in minutes.",
        "recipes": "List the built-in configurations, or print one.",
        "inspect": "Show what a folder contains and how complete it is.",
    },
    "Prepare images": {
        "prepare": "List images and their captions in a manifest.",
        "extract-features": "Encode images with a pretrained network.",
        "import-features": "Import the features and captions of NeuralTalk.",
    },
    "Train models": {
        "train-captioner": "Train a captioner, or fine-tune it with its encoder.",
        "train-ranker": "Train a ranker (dual encoder) for image-text retrieval.",
        "train-language-model": "Train a language model on captions or any text.",
        "build-datastore": "Store captions for nearest-neighbor reranking.",
    },
    "Generate captions": {
        "generate-captions": "Caption every image of a manifest or features dataset.",
        "caption": "Caption single images and print the result.",
        "embed": "Embed every image with a ranker.",
        "sample": "Print text that a language model generates.",
        "export-captions": "Export captions to COCO's or NeuralTalk's JSON.",
    },
    "Evaluate": {
        "evaluate": "Score captions (BLEU, CIDEr, ...) or a ranker.",
        "report": "Write a web page of images, captions and scores.",
        "activations": "Write a web page of a network's activations.",
    },
    "Search": {
        "build-index": "Index captions and embeddings for search.",
        "query": "Search by words, meaning, image or SQL.",
        "serve": "Serve an index as a web application and JSON API.",
    },
}


class LazyGroup(click.Group):
    """Lists the commands in `COMMANDS`, and imports the module of a command on demand."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for commands in COMMANDS.values() for name in commands]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        command: click.Command = importlib.import_module(f"jobs.{cmd_name.replace('-', '_')}").command
        command.name = cmd_name
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for group, commands in COMMANDS.items():
            with formatter.section(group):
                formatter.write_dl([(f"{name:<20}", summary) for name, summary in commands.items()])


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="`captionlib COMMAND --help` explains a command, with examples.",
)
@click.version_option(__version__, prog_name="captionlib")
def captionlib() -> None:
    """Caption millions of images, and search them.

    Each stage reads folders and writes a folder of Parquet shards. A folder is a path or a URI such as
    s3://bucket/captions. To resume an interrupted stage, run the same command again.

    \b
    From images with captions to a searchable index:
      captionlib prepare dataset.json --output manifest
      captionlib extract-features manifest --output features
      captionlib train-captioner features --output captioner
      captionlib generate-captions features --checkpoint captioner --output captions
      captionlib evaluate captions --manifest manifest --split test
      captionlib build-index captions --output index
      captionlib serve index
    """


def main() -> None:
    """Runs the command line. Converts errors into a message and an exit code."""
    try:
        captionlib.main(standalone_mode=False)
    except (click.exceptions.Abort, TrainingInterrupted):
        click.echo("Stopped. Run the same command again to resume.", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.exceptions.Exit as exit_:
        sys.exit(exit_.exit_code)
    except CaptionlibError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
