"""Self-critical training (Rennie et al. 2017, arXiv 1612.00563): a captioner learns from the CIDEr-D of what it writes.

For each image some sentences are drawn as the model finds them likely now. One that scores higher than its baseline
becomes likelier, one that scores lower less likely:

    loss = -sum (reward - baseline) ln p(token | image, tokens before it) / tokens

END is a token like any other. What is drawn depends on the weights and what dropout leaves of them, on the seed, the
epoch and the image, so that a run that was stopped draws the same again.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from captionlib.data.batches.captions import CaptionBatch
from captionlib.data.text.vocabulary import END, UNKNOWN
from captionlib.errors import ConfigError
from captionlib.models.captioners.captioner import Captioner
from captionlib.models.decoding.beam_search import search_beam
from captionlib.models.decoding.cider_d import CiderD
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.decoding.constraints import Constraints
from captionlib.models.decoding.incremental import Hypotheses, IncrementalCaptioner
from captionlib.models.decoding.sampling import generate_uniforms, sample_tokens
from captionlib.storage.folders import Folder
from captionlib.training.caption_objective import CaptioningObjective
from captionlib.training.objective import BatchLoss

__all__ = ["SelfCriticalBatch", "SelfCriticalConfig", "SelfCriticalObjective"]

Rewards = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SelfCriticalConfig:
    """How a captioner learns from what it writes.

    Attributes:
        samples: sentences drawn for an image at a step.
        baseline: what the reward of a sentence is compared with: the mean of the `others` drawn for its image (Luo
            2020, arXiv 2003.09971), or that of the `greedy` caption (Rennie et al. 2017).
        temperature: of drawing, as in `decoding`.
        dropout: of the captioner while it draws and learns, in place of its own. What is dropped when a sentence is
            drawn is dropped when it is learned from.
        include_end_token: whether END is a word of the n-grams that are rewarded. Without it a sentence that breaks off, as in
            "a man on a", scores as well as one that is whole.
    """

    samples: int = 5
    baseline: Literal["leave_one_out", "greedy"] = "leave_one_out"
    temperature: float = 1.0
    dropout: float = 0.0
    include_end_token: bool = True

    def __post_init__(self) -> None:
        least = 2 if self.baseline == "leave_one_out" else 1
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


class _Drawn(NamedTuple):
    """Sentences that were drawn, as many of each image, image by image.

    Attributes:
        written: the tokens of each, END last where it was reached.
        log_probs: `[tokens] float32`, of all of them, place by place.
        sentences: `[tokens] int64`, the sentence that each belongs to.
    """

    written: list[list[int]]
    log_probs: Tensor
    sentences: Tensor


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
        self._reward = CiderD([self._scored([*one, END]) for one in sentences if one] for sentences in references)
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
        drawn = self._draw(batch)
        rewards, advantages = self._judge(batch.captions, drawn.written, self._search(batch.captions))
        weights = torch.from_numpy(advantages.flatten()).to(self._device, torch.float32)
        total = -(weights[drawn.sentences] * drawn.log_probs).sum()
        tokens = len(drawn.sentences)
        return BatchLoss(total / max(tokens, 1), total.item(), tokens, float(rewards.sum()), rewards.size)

    def validate(self) -> dict[str, float]:
        return self._captioning.validate()

    def save(self, output: Folder, training: dict[str, Any]) -> None:
        self._captioning.save(output, training)

    def _draw(self, batch: SelfCriticalBatch) -> _Drawn:
        """Draws sentences for each image, by the same network that learns from them, with what dropout leaves of it."""
        images, samples = batch.captions.features, self._config.samples
        keys = [f"{batch.seed} {batch.epoch} ".encode() + image.tobytes() for image in images]
        uniforms = generate_uniforms(keys, samples, self._drawing.max_tokens, seed=0).to(self._device)
        image_state = self.model.encode_images(torch.from_numpy(images).to(self._device))
        alive = torch.arange(len(images) * samples, device=self._device)  # the sentences that are still written
        state, word = image_state.state.index_select(1, alive // samples), torch.full_like(alive, END)
        written: list[list[int]] = [[] for _ in alive]
        log_probs, sentences = [], []
        for uniform in uniforms.unbind(1):
            foretold, state = self.model.step(word, state, image_state, alive // samples)
            with torch.no_grad():
                allowed = foretold.clone()
                self._constraints.apply(allowed, word[:, None])
                word = sample_tokens(allowed, uniform[alive], self._drawing)
            log_probs.append(foretold.gather(1, word[:, None])[:, 0])
            sentences.append(alive)
            for sentence, drawn in zip(alive.tolist(), word.tolist(), strict=True):
                written[sentence].append(drawn)
            goes_on = word != END
            alive, word, state = alive[goes_on], word[goes_on], state[:, goes_on]
            if not len(alive):
                break
        return _Drawn(written, torch.cat(log_probs), torch.cat(sentences))

    @torch.inference_mode()
    def _search(self, batch: CaptionBatch) -> list[list[int]]:
        """The tokens of the greedy sentence of each image; none where it is not asked for."""
        if self._config.baseline == "leave_one_out":
            return []
        kind = self._device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        incremental = IncrementalCaptioner(self.model, dtype)
        with torch.autocast(kind, enabled=False):
            start: Hypotheses = incremental.begin(incremental.encode_images(torch.from_numpy(batch.features)))
            found = search_beam(incremental, self._greedy, self._constraints, start)
        return [[*one.token_ids, END][: one.token_count] for (one,) in found]

    def _judge(self, batch: CaptionBatch, drawn: list[list[int]], greedy: list[list[int]]) -> tuple[Rewards, Rewards]:
        """The rewards of the drawn sentences, and by how much they surpass the baseline; `[images, samples]` each."""
        samples = self._config.samples
        references: list[list[list[int]]] = [[] for _ in batch.features]
        for sentence, image in zip(batch.sentences, batch.image_of_sentence, strict=True):
            references[image].append(self._scored([*sentence, END]))
        of_images = []
        for image, theirs in enumerate(references):
            ours = [*drawn[image * samples : (image + 1) * samples], *greedy[image : image + 1]]
            of_images.append(self._reward.score([self._scored(one) for one in ours], theirs))
        scores = np.array(of_images)
        rewards = scores[:, :samples]
        if greedy:
            return rewards, rewards - scores[:, samples:]
        others = (rewards.sum(1, keepdims=True) - rewards) / (samples - 1)
        return rewards, rewards - others

    def _scored(self, tokens: list[int]) -> list[int]:
        """What of a sentence is rewarded."""
        return tokens if self._config.include_end_token else [token for token in tokens if token != END]


def _set_dropout(model: nn.Module, share: float) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = share
        elif isinstance(module, nn.RNNBase):
            module.dropout = share
