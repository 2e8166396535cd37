import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from captionlib.training.ranking_losses import contrastive_loss, max_margin_loss

# Scores of two images (rows) and three captions (columns). Captions 0 and 1 describe image 0, caption 2 image 1.
SCORES = torch.tensor([[0.9, 0.4, 0.5], [0.8, 0.1, 0.6]])
IMAGE_OF_CAPTION = torch.tensor([0, 0, 1])


def test_max_margin_loss_sums_the_costs_of_all_negatives() -> None:
    # Costs of negative images, by pair (image, caption):
    # (0, 0): 0.2 - 0.9 + 0.8 = 0.1; (0, 1): 0.2 - 0.4 + 0.1 < 0; (1, 2): 0.2 - 0.6 + 0.5 = 0.1.
    # Costs of negative captions: (0, 0): 0.2 - 0.9 + 0.5 < 0; (0, 1): 0.2 - 0.4 + 0.5 = 0.3;
    # (1, 2): 0.2 - 0.6 + 0.8 = 0.4 and 0.2 - 0.6 + 0.1 < 0.
    assert max_margin_loss(SCORES, IMAGE_OF_CAPTION, 0.2).item() == pytest.approx((0.1 + 0.1 + 0.3 + 0.4) / 3)


def test_hard_negatives_are_one_image_and_one_caption_per_pair() -> None:
    # With a margin of 0.6, both negative captions of pair (1, 2) have a cost: 0.6 - 0.6 + 0.8 = 0.8 and 0.1.
    images = (0.6 - 0.9 + 0.8) + (0.6 - 0.4 + 0.1) + (0.6 - 0.6 + 0.5)
    captions = (0.6 - 0.9 + 0.5) + (0.6 - 0.4 + 0.5) + 0.8
    hardest, all_negatives = (max_margin_loss(SCORES, IMAGE_OF_CAPTION, 0.6, hard).item() for hard in (True, False))
    assert hardest == pytest.approx((images + captions) / 3)
    assert all_negatives == pytest.approx((images + captions + 0.1) / 3)


def test_contrastive_is_the_softmax_of_each_pair_among_its_negatives() -> None:
    def nll(pair: float, negatives: list[float]) -> float:
        return -math.log(math.exp(pair / 0.5) / sum(math.exp(score / 0.5) for score in [pair, *negatives]))

    among_images = [nll(0.9, [0.8]), nll(0.4, [0.1]), nll(0.6, [0.5])]
    among_captions = [nll(0.9, [0.5]), nll(0.4, [0.5]), nll(0.6, [0.8, 0.1])]
    expected = (sum(among_images) + sum(among_captions)) / 6
    assert contrastive_loss(SCORES, IMAGE_OF_CAPTION, torch.tensor(0.5).log()).item() == pytest.approx(expected)


def compute_losses(scores: Tensor, image_of_caption: Tensor) -> list[Tensor]:
    return [
        max_margin_loss(scores, image_of_caption, 0.2),
        max_margin_loss(scores, image_of_caption, 0.2, hard_negatives=True),
        contrastive_loss(scores, image_of_caption, torch.tensor(-1.0)),
    ]


def sample_scores(seed: int) -> tuple[Tensor, Tensor]:
    """Returns random scores and `image_of_caption`."""
    generator = torch.Generator().manual_seed(seed)
    image_of_caption = torch.arange(4).repeat_interleave(torch.randint(1, 4, (4,), generator=generator))
    return 2 * torch.rand(4, len(image_of_caption), generator=generator) - 1, image_of_caption


@settings(deadline=None)
@given(st.integers(0, 10_000))
def test_the_order_of_captions_changes_nothing(seed: int) -> None:
    scores, images = sample_scores(seed)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(compute_losses(scores, images), compute_losses(scores[:, order], images[order]))


@settings(deadline=None)
@given(st.integers(0, 10_000))
def test_another_caption_of_the_same_image_is_not_a_negative(seed: int) -> None:
    scores, images = sample_scores(seed)
    scores.requires_grad_()
    for loss in compute_losses(scores, images):
        (gradient,) = torch.autograd.grad(loss, scores)
        pair_gradients = gradient.gather(0, images[None])[0]
        assert (pair_gradients <= 1e-7).all(), "no loss lowers the score of an image and its own caption"


@pytest.mark.parametrize("which", [0, 1, 2])
def test_batch_without_negatives_has_no_gradient(which: int) -> None:
    scores = torch.tensor([[0.3, 0.2]], requires_grad=True)
    loss = compute_losses(scores, torch.tensor([0, 0]))[which]
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0
    assert scores.grad is not None
    assert scores.grad.abs().max() == 0
