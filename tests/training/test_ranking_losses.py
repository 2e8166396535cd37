import math

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from captionlib.training.ranking_losses import contrastive_loss, max_margin_loss

# Two images; sentences 0 and 1 are of image 0, sentence 2 is of image 1.
SCORES = torch.tensor([[0.9, 0.4, 0.5], [0.8, 0.1, 0.6]])
OWNERS = torch.tensor([0, 0, 1])


def test_margin_adds_up_all_negatives() -> None:
    # Other images: 0.2 - 0.9 + 0.8 = 0.1; 0.2 - 0.4 + 0.1 < 0; 0.2 - 0.6 + 0.5 = 0.1.
    # Other sentences: of (0, 0): 0.2 - 0.9 + 0.5 < 0; of (0, 1): 0.2 - 0.4 + 0.5 = 0.3;
    # of (1, 2): 0.2 - 0.6 + 0.8 = 0.4 and 0.2 - 0.6 + 0.1 < 0.
    assert max_margin_loss(SCORES, OWNERS, 0.2).item() == pytest.approx((0.1 + 0.1 + 0.3 + 0.4) / 3)


def test_hardest_takes_one_negative_of_each_kind() -> None:
    # With a margin of 0.6 both of (1, 2)'s sentences cost: 0.6 - 0.6 + 0.8 = 0.8 and 0.1; the hardest is 0.8.
    images = (0.6 - 0.9 + 0.8) + (0.6 - 0.4 + 0.1) + (0.6 - 0.6 + 0.5)
    sentences = (0.6 - 0.9 + 0.5) + (0.6 - 0.4 + 0.5) + 0.8
    assert max_margin_loss(SCORES, OWNERS, 0.6, hard_negatives=True).item() == pytest.approx((images + sentences) / 3)
    assert max_margin_loss(SCORES, OWNERS, 0.6).item() == pytest.approx((images + sentences + 0.1) / 3)


def test_contrastive_is_the_softmax_of_each_pair_among_its_negatives() -> None:
    def nll(pair: float, negatives: list[float]) -> float:
        return -math.log(math.exp(pair / 0.5) / sum(math.exp(score / 0.5) for score in [pair, *negatives]))

    among_images = [nll(0.9, [0.8]), nll(0.4, [0.1]), nll(0.6, [0.5])]
    among_sentences = [nll(0.9, [0.5]), nll(0.4, [0.5]), nll(0.6, [0.8, 0.1])]
    expected = (sum(among_images) + sum(among_sentences)) / 6
    assert contrastive_loss(SCORES, OWNERS, torch.tensor(0.5).log()).item() == pytest.approx(expected)


def losses(scores: Tensor, owners: Tensor) -> list[Tensor]:
    return [
        max_margin_loss(scores, owners, 0.2),
        max_margin_loss(scores, owners, 0.2, hard_negatives=True),
        contrastive_loss(scores, owners, torch.tensor(-1.0)),
    ]


def draw(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    owners = torch.arange(4).repeat_interleave(torch.randint(1, 4, (4,), generator=generator))
    return 2 * torch.rand(4, len(owners), generator=generator) - 1, owners


@given(st.integers(0, 10_000))
def test_the_order_of_sentences_changes_nothing(seed: int) -> None:
    scores, owners = draw(seed)
    order = torch.randperm(len(owners), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(losses(scores, owners), losses(scores[:, order], owners[order]))


@given(st.integers(0, 10_000))
def test_another_sentence_of_the_same_image_is_no_negative(seed: int) -> None:
    scores, owners = draw(seed)
    scores.requires_grad_()
    for loss in losses(scores, owners):
        (gradient,) = torch.autograd.grad(loss, scores)
        own = gradient.gather(0, owners[None])[0]
        assert (own <= 1e-7).all(), "what is said of an image is never pushed away from it"


@pytest.mark.parametrize("which", [0, 1, 2])
def test_no_negatives_no_gradient(which: int) -> None:
    scores = torch.tensor([[0.3, 0.2]], requires_grad=True)
    loss = losses(scores, torch.tensor([0, 0]))[which]
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0
    assert scores.grad is not None
    assert scores.grad.abs().max() == 0
