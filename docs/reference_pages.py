"""MkDocs hook that generates the reference pages from the code: commands, configuration, schemas and the Python API."""

import ast
import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import click
import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import captionlib
from captionlib.collection import CollectionConfig, SourceConfig
from captionlib.config import to_dict
from captionlib.data.shards import schemas
from captionlib.recipes import list_recipes
from jobs.cli import COMMANDS, captionlib as command_line


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages to the site."""
    pages = {
        "reference/commands.md": render_commands(),
        "reference/configuration.md": render_configuration(),
        "reference/schemas.md": render_schemas(),
        "reference/python.md": render_python_api(),
    }
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


# Commands


def render_commands() -> str:
    """Returns the page of all commands and their options."""
    lines = ["# Commands", "", "Generated from `captionlib COMMAND --help`.", ""]
    context = click.Context(command_line, info_name="captionlib")
    for section, commands in COMMANDS.items():
        lines += [f"## {section}", ""]
        for name in commands:
            command = command_line.get_command(context, name)
            assert command is not None
            lines += [f"### captionlib {name}", "", *_render_command(command, name, context), ""]
    return "\n".join(lines)


def _render_command(command: click.Command, name: str, parent: click.Context) -> Iterator[str]:
    context = click.Context(command, info_name=name, parent=parent)
    usage = " ".join(command.collect_usage_pieces(context))
    yield from ["```", f"captionlib {name} {usage}", "```", ""]
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        if "\b" in paragraph:
            yield from _render_verbatim(paragraph.replace("\b", ""))
        else:
            yield " ".join(paragraph.split())
        yield ""
    yield from ["| Option | Description |", "|---|---|"]
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None and record[1]:
            yield f"| `{record[0]}` | {_escape(record[1])} |"


def _render_verbatim(paragraph: str) -> Iterator[str]:
    """Renders a paragraph whose line breaks count: lines of prose as they are, indented lines as a code block."""
    lines = [line.rstrip() for line in paragraph.strip("\n").split("\n")]
    prose = [line for line in lines if not line.startswith(" ")]
    code = [line.strip() for line in lines if line.startswith(" ")]
    yield from prose
    if code:
        yield from ["", "```sh", *code, "```"]


def _escape(text: str) -> str:
    """Escapes what Markdown would interpret, outside of code spans."""
    parts = " ".join(text.split()).split("`")
    return "`".join(part if number % 2 else re.sub(r"([<>*_|])", r"\\\1", part) for number, part in enumerate(parts))


# Configuration


def render_configuration() -> str:
    """Returns the page of all configuration keys, by command."""
    lines = [
        *("# Configuration", ""),
        "Every key can be set in a YAML file (`--config FILE`) or on the command line (`--set KEY=VALUE`).",
        "`captionlib recipes` lists the recipes, which are files that ship with captionlib. A file can start from",
        "another one with `extends: FILE`.",
        "",
    ]
    for commands in COMMANDS.values():
        for command in commands:
            for config_type in find_config_types(command):
                lines += [f"## {command}: {config_type.__name__}", ""]
                if names := list_recipes(command):
                    lines += ["Recipes: " + ", ".join(f"`{name}`" for name in names), ""]
                lines += ["| Key | Type | Default | Description |", "|---|---|---|---|"]
                lines += [*_render_keys(config_type, to_dict(config_type())), ""]
    return "\n".join([*lines, *_render_collection()])


def _render_collection() -> Iterator[str]:
    config = CollectionConfig(sources=(SourceConfig(name="images", addresses=("images/",)),), captioner="captioner")
    yield from ["## collection.yaml", "", "The configuration of a [collection](../how-to/collections.md).", ""]
    yield from ["| Key | Type | Default | Description |", "|---|---|---|---|"]
    yield from _render_keys(SourceConfig, to_dict(config.sources[0]), "sources[].")
    yield from (row for row in _render_keys(CollectionConfig, to_dict(config)) if not row.startswith("| `sources` |"))


def find_config_types(command: str) -> list[type[Any]]:
    """Returns the configuration classes that the option --config of a command fills."""
    module = importlib.import_module(f"jobs.{command.replace('-', '_')}")
    if all(parameter.name != "config" for parameter in module.command.params):
        return []
    nodes = list(ast.walk(ast.parse(inspect.getsource(module))))
    imports = (node for node in nodes if isinstance(node, ast.ImportFrom))
    modules = {alias.name: node.module or "" for node in imports for alias in node.names}
    calls = (node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "load_config")
    names = dict.fromkeys(ast.unparse(call.args[0]) for call in calls)
    return [getattr(importlib.import_module(modules[name]), name) for name in names]


def _render_keys(config_type: type[Any], defaults: dict[str, Any], prefix: str = "") -> Iterator[str]:
    descriptions = _read_attributes(config_type)
    hints = get_type_hints(config_type, include_extras=True)
    for field in dataclasses.fields(config_type):
        default, hint = defaults[field.name], hints[field.name]
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            yield from _render_keys(hint, default, f"{prefix}{field.name}.")
        else:
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            shown = "required" if required else f"`{_to_yaml(default)}`"
            cells = [f"`{prefix}{field.name}`", f"`{_describe_type(hint)}`", shown]
            yield f"| {' | '.join(cells)} | {_escape(descriptions.get(field.name, ''))} |"


def _read_attributes(config_type: type[Any]) -> dict[str, str]:
    docstring = griffe.Docstring(inspect.getdoc(config_type) or "")
    sections = docstring.parse("google", warnings=False)
    attributes = (section.value for section in sections if section.kind is griffe.DocstringSectionKind.attributes)
    return {item.name: _write_for_yaml(item.description) for section in attributes for item in section}


def _write_for_yaml(description: str) -> str:
    text = re.sub(r"\bNone\b", "null", " ".join(description.split()))
    return text[:1].upper() + text[1:]


def _describe_type(hint: Any) -> str:
    if get_origin(hint) is Annotated:
        base, *constraints = get_args(hint)
        bounds = [f"{name} {value}" for constraint in constraints for name, value in _read_bounds(constraint)]
        return f"{_describe_type(base)} {', '.join(bounds)}".strip()
    arguments = get_args(hint)
    if get_origin(hint) is not None and "Literal" in str(get_origin(hint)):
        return " | ".join(str(argument) for argument in arguments)
    if arguments and type(None) in arguments:
        return " | ".join("null" if argument is type(None) else _describe_type(argument) for argument in arguments)
    if get_origin(hint) is tuple:
        return f"list of {_describe_type(arguments[0])}"
    if isinstance(get_origin(hint), type):
        return "mapping"
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _read_bounds(constraint: Any) -> Iterator[tuple[str, Any]]:
    for name, symbol in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤")):
        for item in (constraint, *getattr(constraint, "metadata", ())):
            value = getattr(item, name, None)
            if value is not None:
                yield symbol, value


def _to_yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) if value != "" else '""'


# Schemas


def render_schemas() -> str:
    """Returns the page of the columns of every dataset."""
    datasets = {
        "manifest": ("One row per image. Written by `prepare`.", schemas.MANIFEST_SCHEMA),
        "features": (
            "One row per encoded image. Written by `extract-features` and `import-features`. The list has as many "
            "values as the encoder's output; VGG-16 at `fc7` has 4,096.",
            schemas.features_schema(4096, "float16"),
        ),
        "captions": (
            "One row per captioned image. Written by `generate-captions`. The column `image_text_score` exists with "
            "`--ranker`, the column `attention` with `attention_maps=true`.",
            schemas.captions_schema(positions=196, has_scores=True),
        ),
        "embeddings": (
            "One row per embedded image. Written by `embed`, and by `generate-captions` with `--embeddings`.",
            schemas.embeddings_schema(512),
        ),
        "duplicates": (
            "One row per image that has duplicates. Written by `deduplicate`.",
            schemas.DUPLICATES_SCHEMA,
        ),
        "__failures": (
            "One row per image that could not be read, in the folder `__failures` of a dataset.",
            schemas.FAILURES_SCHEMA,
        ),
    }
    lines = [
        *("# Schemas", ""),
        "The columns of every dataset that captionlib writes. [Analyze the Parquet files](../how-to/parquet.md) shows",
        "how to read them with other tools.",
        "",
    ]
    for name, (description, schema) in datasets.items():
        lines += [f"## {name}", "", description, "", "| Column | Type | Description |", "|---|---|---|"]
        lines += [
            f"| `{field.name}` | `{field.type}` | {schemas.COLUMN_DESCRIPTIONS[field.name]} |" for field in schema
        ]
        lines.append("")
    return "\n".join(lines)


# Python API


def render_python_api() -> str:
    """Returns the page of the public Python API."""
    lines = ["# Python API", "", inspect.getdoc(captionlib) or "", ""]
    for name in captionlib.__all__:
        target = getattr(captionlib, name)
        if not name.startswith("_"):
            lines += [f"::: {target.__module__}.{target.__qualname__}", ""]
    return "\n".join(lines)
