"""Runs the commands that the README shows to a user with a folder of images and no captioner."""

from pathlib import Path

import pytest

from captionlib.models.families import huggingface
from tests.docs.markdown import ROOT, read_commands
from tests.docs.test_tutorials import count_rows, folder, run, write_images
from tests.jobs.test_serve import free_port
from tests.models.families.tiny_models import write_blip

__all__ = ["folder"]


def test_one_command_or_three_lead_from_a_folder_to_a_search_page(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blip = write_blip(folder / "blip")
    downloads: list[str] = []
    monkeypatch.setattr(huggingface, "_download", lambda location: downloads.append(location) or blip)
    write_images([folder / "images" / "one.jpg", folder / "images" / "two.jpg"])
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (folder / "section.md").write_text(text.split("## Caption and search a folder")[1].split("\n## ")[0])
    commands = read_commands(folder / "section.md")
    collection, separate = commands[:3], commands[3:]
    assert [command[0] for command in collection] == ["init", "update", "serve"]
    assert [command[0] for command in separate] == ["prepare", "generate-captions", "build-index"]
    assert collection[0][-1] == separate[-1][-1] == "--serve"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    for command in (collection[0], *separate):
        output = run([*command, str(free_port())] if command[-1] == "--serve" else command)
    assert "Serving index at http://127.0.0.1:" in output
    assert downloads == ["Salesforce/blip-image-captioning-large@main"] * len(downloads)
    assert count_rows("captions") == count_rows("holidays/images/captions") == 2
