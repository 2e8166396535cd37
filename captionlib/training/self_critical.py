"""Self-critical training (Rennie et al. 2017, arXiv 1612.00563): a captioner learns from the CIDEr-D of its samples.

The captioner samples captions for each image. Captions whose reward exceeds the baseline become more probable, and
all others become less probable:

    loss = -sum (reward - baseline) ln p(token | image, previous tokens) / number of tokens

The END token, which also serves as the start token, counts in the probabilities and in the n-grams of the reward.
Otherwise, an incomplete caption such as "a man on a" could score as high as a complete one. The weights, dropout, the
seed, the epoch and the image determine the samples, so a resumed run reproduces them.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from captionlib.config import configclass
from captionlib.data.batches.captions import CaptionBatch
from captionlib.data.text.vocabulary import END, UNKNOWN
from captionlib.errors import ConfigError
from captionlib.models.captioners.captioner import CaptionerNetwork
from captionlib.models.decoding.beam_search import search_beam
from captionlib.models.decoding.cider_d import CiderD
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.decoding.constraints import Constraints
from captionlib.models.decoding.incremental import Hypotheses, IncrementalCaptioner
from captionlib.models.decoding.sampling import generate_uniforms, sample_tokens
from captionlib.training.caption_objective import CaptioningObjective
from captionlib.training.objective import BatchLoss, Objective

__all__ = ["SelfCriticalBatch", "SelfCriticalConfig", "SelfCriticalObjective"]

Rewards = npt.NDArray[np.float64]


@configclass
class SelfCriticalConfig:
    """Settings of self-critical training.

    Attributes:
        samples: the number of captions to sample per image and step.
        baseline: the reward that a sample's reward is compared with. `leave_one_out` is the mean reward of the image's
            other samples (Luo 2020, arXiv 2003.09971). `greedy` is the reward of the greedy caption (Rennie et al.
            2017).
        dropout: the dropout probability, which replaces the captioner's own. Samples and gradients use the same masks.
    """

    samples: PositiveInt = 5
    baseline: Literal["leave_one_out", "greedy"] = "leave_one_out"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def __post_init__(self) -> None:
        if self.baseline == "leave_one_out" and self.samples < 2:
            raise ConfigError(
                f"self_critical.samples: expected at least 2 for baseline leave_one_out, got {self.samples}"
            )


@dataclass(frozen=True)
class SelfCriticalBatch:
    """Images with their reference captions, and the seed and epoch that determine the samples."""

    captions: CaptionBatch
    seed: int
    epoch: int


class _Samples(NamedTuple):
    """The sampled captions, grouped by image, with the same number for each image.

    Attributes:
        captions: the token ids of each caption, ending with END unless the caption was truncated.
        log_probs: `[tokens] float32`, the log-probabilities of the tokens of all captions, ordered by time step.
        sentences: `[tokens] int64`, the index of each token's caption.
    """

    captions: list[list[int]]
    log_probs: Tensor
    sentences: Tensor


class SelfCriticalObjective(Objective[SelfCriticalBatch, CaptionerNetwork]):
    """Maximizes the expected CIDEr-D of samples. `captioning` provides batches, validation and checkpoints.

    `references` holds the reference captions of each training image as token ids. It is iterated once, to count the
    images that each n-gram of CIDEr-D occurs in. Samples are truncated after `max_tokens` tokens.
    """

    def __init__(
        self,
        captioning: CaptioningObjective[CaptionerNetwork],
        config: SelfCriticalConfig,
        references: Iterable[Sequence[list[int]]],
        max_tokens: int,
    ) -> None:
        super().__init__(captioning.model, captioning.save, captioning.module_learning_rates)
        self.score_name, self.higher_is_better = captioning.score_name, captioning.higher_is_better
        self._captioning = captioning
        self._config = config
        self._cider_d = CiderD([[*ids, END] for ids in per_image if ids] for per_image in references)
        self._sampling = DecodingConfig("sample", n_best=config.samples, max_tokens=max_tokens)
        self._greedy = DecodingConfig(beam_width=1, max_tokens=max_tokens)
        self._constraints = Constraints(self._sampling, torch.tensor([UNKNOWN], device=self._device))
        _set_dropout(self.model, config.dropout)

    def batches(self, seed: int, epoch: int, first_batch: int) -> Iterator[SelfCriticalBatch | None]:
        for batch in self._captioning.batches(seed, epoch, first_batch):
            yield None if batch is None else SelfCriticalBatch(batch, seed, epoch)

    def steps_per_epoch(self) -> int:
        return self._captioning.steps_per_epoch()

    def loss(self, batch: SelfCriticalBatch) -> BatchLoss:
        samples = self._sample(batch)
        rewards, advantages = self._compute_rewards(batch.captions, samples.captions)
        weights = torch.from_numpy(advantages.flatten()).to(self._device, torch.float32)
        total = -(weights[samples.sentences] * samples.log_probs).sum()
        tokens = len(samples.sentences)
        return BatchLoss(total / max(tokens, 1), total.item(), tokens, float(rewards.sum()), rewards.size)

    def validate(self) -> dict[str, float]:
        return self._captioning.validate()

    def _sample(self, batch: SelfCriticalBatch) -> _Samples:
        images, samples = batch.captions.features, self._config.samples
        seed_keys = [f"{batch.seed} {batch.epoch} ".encode() + image.tobytes() for image in images]
        uniforms = generate_uniforms(seed_keys, samples, self._sampling.find_max_tokens(), seed=0).to(self._device)
        image_state = self.model.encode_images(torch.from_numpy(images).to(self._device))
        active = torch.arange(len(images) * samples, device=self._device)  # captions that have not reached END
        state, token_ids = image_state.state.index_select(1, active // samples), torch.full_like(active, END)
        captions: list[list[int]] = [[] for _ in active]
        log_probs, sentences = [], []
        for uniform in uniforms.unbind(1):
            predicted, state = self.model.step(token_ids, state, image_state, active // samples)
            with torch.no_grad():
                allowed = predicted.clone()
                self._constraints.apply(allowed, token_ids[:, None])
                token_ids = sample_tokens(allowed, uniform[active], self._sampling)
            log_probs.append(predicted.gather(1, token_ids[:, None])[:, 0])
            sentences.append(active)
            for sentence, token in zip(active.tolist(), token_ids.tolist(), strict=True):
                captions[sentence].append(token)
            is_active = token_ids != END
            active, token_ids, state = active[is_active], token_ids[is_active], state[:, is_active]
            if not len(active):
                break
        return _Samples(captions, torch.cat(log_probs), torch.cat(sentences))

    @torch.inference_mode()
    def _search_greedily(self, batch: CaptionBatch) -> list[list[int]]:
        """Returns the token ids of the greedy caption of each image."""
        kind = self._device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        captioner = IncrementalCaptioner(self.model, dtype)
        with torch.autocast(kind, enabled=False):
            start: Hypotheses = captioner.begin(captioner.encode_images(torch.from_numpy(batch.features)))
            candidates = search_beam(captioner, self._greedy, self._constraints, start)
        # The token count includes END, unless the caption was truncated.
        return [[*best.token_ids, END][: best.token_count] for (best,) in candidates]

    def _compute_rewards(self, batch: CaptionBatch, sampled: list[list[int]]) -> tuple[Rewards, Rewards]:
        """Returns the rewards of the samples and their advantages (reward - baseline), `[images, samples]` each."""
        samples = self._config.samples
        references: list[list[list[int]]] = [[] for _ in batch.features]
        for sentence, image in zip(batch.sentences, batch.image_of_caption, strict=True):
            references[image].append([*sentence, END])
        per_image = [sampled[begin : begin + samples] for begin in range(0, len(sampled), samples)]
        rewards = np.array(list(map(self._cider_d.score, per_image, references)))
        if self._config.baseline == "greedy":
            greedy = [[caption] for caption in self._search_greedily(batch)]
            return rewards, rewards - np.array(list(map(self._cider_d.score, greedy, references)))
        return rewards, rewards - (rewards.sum(1, keepdims=True) - rewards) / (samples - 1)


def _set_dropout(model: nn.Module, probability: float) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        elif isinstance(module, nn.RNNBase):
            module.dropout = probability
