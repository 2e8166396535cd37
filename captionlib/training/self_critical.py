"""Self-critical training (Rennie et al. 2017, arXiv 1612.00563): a captioner learns from the CIDEr-D of what it writes.

For each image some sentences are drawn as the model finds them likely now. One that scores higher than its baseline
becomes likelier, one that scores lower less likely:

    loss = -sum (reward - baseline) ln p(token | image, tokens before it) / tokens

END is a token like any other. What is drawn depends on the weights, the seed, the epoch and the image alone, so that a
run that was stopped draws the same again.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from captionlib.data.batches import CaptionBatch
from captionlib.data.vocabulary import END, UNKNOWN
from captionlib.errors import ConfigError
from captionlib.evaluation.cider_reward import CiderReward
from captionlib.models.beam_search import search_beam
from captionlib.models.captioner import Captioner, TokenScores
from captionlib.models.constraints import Constraints
from captionlib.models.decoding import Candidate, DecodingConfig
from captionlib.models.sampling import draw_sentences
from captionlib.models.stepping import Start, Stepper
from captionlib.storage import Folder
from captionlib.training.caption_objective import CaptioningObjective
from captionlib.training.objective import BatchLoss

__all__ = ["SelfCriticalBatch", "SelfCriticalConfig", "SelfCriticalObjective", "policy_loss"]

Rewards = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SelfCriticalConfig:
    """How a captioner learns from what it writes.

    Attributes:
        samples: sentences drawn for an image at a step.
        baseline: what the reward of a sentence is compared with: the mean of the `others` drawn for its image (Luo
            2020, arXiv 2003.09971), or that of the `greedy` caption (Rennie et al. 2017).
        temperature: of drawing, as in `decoding`.
        dropout: of the captioner while it learns, in place of its own. Sentences are drawn without any, so that with it
            a network learns from sentences that another has drawn, which may fail to hold: on Flickr8k, with attention
            and 0.4, the reward fell again and perplexity went from 17 to 649 in 160 steps, to 31 without.
        score_end: whether END is a word of the n-grams that are rewarded. Without it a sentence that breaks off, as in
            "a man on a", scores as well as one that is whole.
    """

    samples: int = 5
    baseline: Literal["others", "greedy"] = "others"
    temperature: float = 1.0
    dropout: float = 0.0
    score_end: bool = True

    def __post_init__(self) -> None:
        least = 2 if self.baseline == "others" else 1
        if self.samples < least:
            raise ConfigError(
                f"self_critical.samples: expected at least {least} for baseline {self.baseline}, got {self.samples}"
            )
        if not self.temperature > 0:
            raise ConfigError(f"self_critical.temperature: expected more than 0, got {self.temperature}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"self_critical.dropout: expected at least 0 and below 1, got {self.dropout}")


@dataclass(frozen=True)
class SelfCriticalBatch:
    """Some images with what people said of them, and what decides about the sentences that are drawn for them."""

    captions: CaptionBatch
    seed: int
    epoch: int


class SelfCriticalObjective:
    """The CIDEr-D of drawn sentences; data, validation and checkpoints are those of captioning.

    Args:
        captioning: the captioner and its data.
        config: how it learns.
        references: the sentences of each training image, as word ids, from which the reward has the frequencies of
            n-grams; read once, not kept.
        max_tokens: longer sentences are cut off, see `DecodingConfig`.
    """

    def __init__(
        self,
        captioning: CaptioningObjective[Captioner],
        config: SelfCriticalConfig,
        references: Iterable[Sequence[list[int]]],
        max_tokens: int,
    ) -> None:
        self.model: Captioner = captioning.model
        self.score_name = captioning.score_name
        self.higher_is_better = captioning.higher_is_better
        self._captioning = captioning
        self._config = config
        self._reward = CiderReward([self._scored(one) for one in sentences if one] for sentences in references)
        self._drawing = DecodingConfig(
            "sample", n_best=config.samples, temperature=config.temperature, max_tokens=max_tokens
        )
        self._greedy = DecodingConfig(beam_width=1, max_tokens=max_tokens)
        self._device = next(self.model.parameters()).device
        self._constraints = Constraints(self._drawing, torch.tensor([UNKNOWN], device=self._device))
        _set_dropout(self.model, config.dropout)

    def batches(self, seed: int, epoch: int, first: int) -> Iterator[SelfCriticalBatch | None]:
        for batch in self._captioning.batches(seed, epoch, first):
            yield None if batch is None else SelfCriticalBatch(batch, seed, epoch)

    def steps(self) -> int:
        return self._captioning.steps()

    def loss(self, batch: SelfCriticalBatch) -> BatchLoss:
        """The mean over the tokens that were drawn; see `Objective.loss`."""
        drawn, greedy = self._write(batch)
        rewards, advantages = self._judge(batch.captions, drawn, greedy)
        sentences = list(chain.from_iterable(drawn))
        owners = np.repeat(np.arange(len(drawn)), self._config.samples)
        written = CaptionBatch(batch.captions.features, [one.words for one in sentences], owners)
        total, tokens = policy_loss(
            self._captioning.score(written),
            torch.from_numpy(advantages.flatten()).to(self._device, torch.float32),
            torch.tensor([not _is_whole(one) for one in sentences], device=self._device),
        )
        return BatchLoss(total / max(tokens, 1), total.item(), tokens, float(rewards.sum()), rewards.size)

    def validate(self) -> dict[str, float]:
        return self._captioning.validate()

    def save(self, output: Folder, training: dict[str, Any]) -> None:
        self._captioning.save(output, training)

    @torch.inference_mode()
    def _write(self, batch: SelfCriticalBatch) -> tuple[list[list[Candidate]], list[list[Candidate]]]:
        """The sentences that are drawn for each image, and the greedy one where it is asked for."""
        features = torch.from_numpy(batch.captions.features)
        keys = [f"{batch.seed} {batch.epoch} ".encode() + image.tobytes() for image in batch.captions.features]
        kind = self._device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        stepper = Stepper(self.model, dtype)
        with torch.autocast(kind, enabled=False):
            start: Start = stepper.begin(features)
            drawn = draw_sentences(stepper, self._drawing, self._constraints, start, keys)
            if self._config.baseline == "others":
                return drawn, []
            return drawn, search_beam(stepper, self._greedy, self._constraints, start)

    def _judge(
        self, batch: CaptionBatch, drawn: list[list[Candidate]], greedy: list[list[Candidate]]
    ) -> tuple[Rewards, Rewards]:
        """The rewards of the drawn sentences, and by how much they surpass the baseline; `[images, samples]` each."""
        references: list[list[list[int]]] = [[] for _ in drawn]
        for sentence, image in zip(batch.sentences, batch.image_of_sentence, strict=True):
            references[image].append(self._scored(sentence))
        candidates = [[*some, *one] for some, one in zip(drawn, greedy, strict=True)] if greedy else drawn
        scores = np.array(
            [
                self._reward.score([self._scored(one.words, _is_whole(one)) for one in some], theirs)
                for some, theirs in zip(candidates, references, strict=True)
            ]
        )
        rewards = scores[:, : self._config.samples]
        if greedy:
            return rewards, rewards - scores[:, -1:]
        others = (rewards.sum(1, keepdims=True) - rewards) / (self._config.samples - 1)
        return rewards, rewards - others

    def _scored(self, sentence: list[int], whole: bool = True) -> list[int]:
        """What of a sentence is rewarded."""
        return [*sentence, END] if whole and self._config.score_end else sentence


def _is_whole(candidate: Candidate) -> bool:
    return candidate.tokens > len(candidate.words)


def policy_loss(scores: TokenScores, advantages: Tensor, cut: Tensor) -> tuple[Tensor, int]:
    """The summed loss of drawn sentences, and how many tokens were drawn.

    Args:
        scores: how likely the model finds them, with an END each.
        advantages: `[sentences] float32`, by how much a sentence's reward surpasses its baseline.
        cut: `[sentences] bool`, those that were cut off: their END was not drawn.
    """
    places = torch.arange(len(scores.sentences), device=scores.sentences.device)
    ends = places.new_zeros(len(advantages)).scatter_reduce(0, scores.sentences, places, "amax")
    drawn = torch.ones_like(scores.log_probs).index_fill(0, ends[cut], 0)
    return -(advantages[scores.sentences] * drawn * scores.log_probs).sum(), len(places) - int(cut.sum())


def _set_dropout(model: nn.Module, share: float) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = share
        elif isinstance(module, nn.RNNBase):
            module.dropout = share
