from pathlib import Path
from typing import Any

import pytest

from captionlib.models.checkpoints import checkpoint
from captionlib.storage.folders import Folder


def count_checkpoint_loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns a list that grows by the folder name of each checkpoint that is read from now on."""
    names: list[str] = []
    read = checkpoint.read_checkpoint

    def read_and_count(folder: Folder, kind: str) -> Any:
        names.append(Path(folder.uri).name)
        return read(folder, kind)

    monkeypatch.setattr(checkpoint, "read_checkpoint", read_and_count)
    return names
