"""The tiny models that other tests use."""

from pathlib import Path

import pytest
import torch

from tests.models.families import tiny_models

WRITERS = ["blip", "git", "vit_gpt2", "clip", "siglip", "dinov2", "vit"]


@pytest.mark.parametrize("name", WRITERS)
def test_weights_do_not_depend_on_the_tests_that_ran_before(name: str, tmp_path: Path) -> None:
    weights = []
    for seed in (0, 1):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            folder = getattr(tiny_models, f"write_{name}")(tmp_path / str(seed))
        weights.append((folder / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
