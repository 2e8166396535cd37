"""The command line: every command is a thin layer over a library call, and is loaded only when it is asked for."""

import importlib
import sys

import click

from captionlib import __version__
from captionlib.errors import CaptionlibError

__all__ = ["captionlib", "main"]

# In the order of the flow, as `--help` teaches it: section, then command, module and summary.
COMMANDS: dict[str, dict[str, tuple[str, str]]] = {
    "The flow, stage by stage": {
        "prepare": ("jobs.prepare", "Images and captions of any source to manifest/."),
        "extract-features": ("jobs.extract_features", "manifest/ to features/: what the encoder sees in each image."),
        "train-captioner": (
            "jobs.train_captioner",
            "features/, or manifest/ and a captioner, to a captioner checkpoint.",
        ),
        "train-language-model": ("jobs.train_language_model", "Sentences alone to a language model checkpoint."),
        "train-ranker": ("jobs.train_ranker", "features/ to a ranker checkpoint: sentences find images and back."),
        "build-datastore": ("jobs.build_datastore", "Store training images and their captions, for k-NN reranking."),
        "generate-captions": ("jobs.generate_captions", "manifest/ or features/ to captions/, with a checkpoint."),
        "embed": ("jobs.embed", "manifest/ or features/ to embeddings/, with a ranker checkpoint."),
        "evaluate": (
            "jobs.evaluate",
            "captions/ against people's: BLEU, METEOR, CIDEr; a ranker on features/: Recall@k.",
        ),
        "report": ("jobs.report", "captions/ to a page of pictures, captions and scores."),
        "build-index": ("jobs.build_index", "captions/ and embeddings/ to index/: words and vectors, to be searched."),
        "query": ("jobs.query", "Ask captions/ or index/: words, sentences, images, SQL."),
        "serve": ("jobs.serve", "index/ in a browser, and as JSON."),
    },
    "At any time": {
        "caption": ("jobs.caption", "Print captions of single images."),
        "sample": ("jobs.sample", "Print sentences or text that a language model writes."),
        "import-features": ("jobs.import_features", "NeuralTalk's dataset.json and vgg_feats.mat to features/."),
        "export-captions": ("jobs.export_captions", "captions/ to COCO's results JSON or NeuralTalk's."),
        "activations": ("jobs.activations", "What the convolution layers see in one image, as a page."),
        "inspect": ("jobs.inspect", "What a folder holds, and how far it is."),
        "demo": ("jobs.demo", "The whole flow on drawn scenes, in minutes."),
    },
}


class FlowGroup(click.Group):
    """Lists commands in the order of the flow, and imports one only to run it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for commands in COMMANDS.values() for name in commands]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        for commands in COMMANDS.values():
            if cmd_name in commands:
                command: click.Command = importlib.import_module(commands[cmd_name][0]).command
                command.name = cmd_name
                return command
        return None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for section, commands in COMMANDS.items():
            with formatter.section(section):
                formatter.write_dl([(name, summary) for name, (_, summary) in commands.items()])


@click.group(cls=FlowGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="captionlib")
def captionlib() -> None:
    """Caption and index images by the million.

    Every stage reads folders and writes a folder of Parquet shards. A stage that died goes on where it stopped when the
    same command is run again. Folders may be paths or addresses such as s3://bucket/captions.

    \b
      captionlib prepare photos/ --output manifest
      captionlib extract-features manifest --output features
      captionlib train-captioner features --output captioner
      captionlib generate-captions features --checkpoint captioner --output captions
      captionlib query captions --contains dog
      captionlib build-index captions --output index
      captionlib serve index
    """


def main() -> None:
    """Runs the command line: an error of captionlib becomes a message and exit code 1."""
    try:
        captionlib.main(standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("Stopped. Run the same command again to go on where it stopped.", err=True)
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
