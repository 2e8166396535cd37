"""A captioner's weights, laid out for writing sentences: a step is one gather and two matrix products."""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from captionlib.data.text.vocabulary import END
from captionlib.models.captioners.captioner import Captioner, ImageState
from captionlib.models.captioners.recurrence import advance
from captionlib.models.decoding.packed_linear import PackedLinear

__all__ = ["DecoderState", "Hypotheses", "IncrementalCaptioner"]


class DecoderState(NamedTuple):
    """What a captioner remembers of some sentences that are being written.

    Attributes:
        memory: `[parents, any]` each: the h of each layer, of an LSTM the c of each, with attention what was seen.
        image: `[parents, gates]`, what the image adds to the next words' gates; None where it adds nothing.
        looks: `[parents] int64`, the row of `annotations` that a sentence looks at; None without attention.
        annotations: `[images, positions, size]`, what there is to be looked at; kept once however many sentences look.
        parent: `[rows] int64`, the row of all but `annotations` that a sentence goes on from; None where each has its own.
    """

    memory: tuple[Tensor, ...]
    image: Tensor | None
    looks: Tensor | None
    annotations: Tensor | None
    parent: Tensor | None = None

    def select(self, rows: Tensor) -> "DecoderState":
        """The state of these rows, `[any number] int64`; a row that comes several times is kept once."""
        if self.parent is not None:
            rows = self.parent.index_select(0, rows)
        kept, parent = torch.unique(rows, return_inverse=True)

        def select(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.index_select(0, kept)

        memory = tuple(values.index_select(0, kept) for values in self.memory)
        return DecoderState(memory, select(self.image), select(self.looks), self.annotations, parent)


class Hypotheses(NamedTuple):
    """Sentences that have only been begun, one a row.

    Attributes:
        log_prob: `[rows] float32`, of the words so far.
        words: `[rows, 1 + words] int64`, START and the words so far.
        state: after all words but the last.
    """

    log_prob: Tensor
    words: Tensor
    state: DecoderState

    def select(self, rows: Tensor) -> "Hypotheses":
        """These rows, `[any number] int64`."""
        return Hypotheses(self.log_prob[rows], self.words[rows], self.state.select(rows))


class IncrementalCaptioner:
    """A snapshot of a captioner that reads one word a step. After a change of the weights make a new one.

    Wxh x + b of the first layer is worked out once for every word of the vocabulary, Whh h once for all sentences that
    go on from the same words.

    Args:
        model: the captioner; the incremental runs on its device.
        dtype: what it computes in, float32 or bfloat16.
    """

    @torch.inference_mode()
    def __init__(self, model: Captioner, dtype: torch.dtype = torch.float32) -> None:
        self.device = model.output.weight.device
        self.dtype = dtype
        self._model = copy.deepcopy(model).eval()
        layers = model.recurrence.all_weights
        first, _, b_ih, b_hh = layers[0]
        self._gates_of_word = torch.addmm(b_ih + b_hh, model.word_vectors.weight, first.t()).to(dtype)
        self._gates_of_image = first.t().clone()
        self._inputs = [PackedLinear(w_ih, b_ih + b_hh, dtype) for w_ih, _, b_ih, b_hh in layers[1:]]
        self._hiddens = [PackedLinear(w_hh, None, dtype) for _, w_hh, *_ in layers]
        self._attention = None if model.attention is None else copy.deepcopy(model.attention).eval().to(dtype)
        if self._attention is not None:
            for name in ("query", "to_gates", "to_output"):
                linear = getattr(self._attention, name)
                setattr(self._attention, name, PackedLinear(linear.weight, linear.bias, dtype))
        self._output = PackedLinear(model.output.weight, model.output.bias, dtype)

    @torch.inference_mode()
    def encode_images(self, features: Tensor) -> ImageState:
        """Takes images in, from `[images, *feature_shape]` on any device."""
        return self._model.encode_images(features.to(self.device, torch.float32))

    @torch.inference_mode()
    def encode_average_image(self) -> ImageState:
        """Takes in the average of the images that the captioner learned from; see `Captioner.encode_average_image`."""
        return self._model.encode_average_image()

    @torch.inference_mode()
    def start(self, image_state: ImageState) -> DecoderState:
        """The state before START, one row an image."""
        _, image, state, annotations = image_state
        adds = self._model.config.image_input in ("first_step", "every_step")
        gates = (image @ self._gates_of_image).to(self.dtype) if adds else None
        memory = state.to(self.dtype).unbind()
        if self._attention is None or annotations is None:
            return DecoderState(memory, gates, None, None)
        annotations, looks = annotations.to(self.dtype), torch.arange(len(annotations), device=self.device)
        top = memory[self._model.config.layers - 1]
        seen, _ = self._attention(top, annotations, self._attention.find_slots(looks, len(annotations)))
        return DecoderState((*memory, seen), gates, looks, annotations)

    @torch.inference_mode()
    def begin(self, image_state: ImageState, prefix: Sequence[int] = ()) -> Hypotheses:
        """A sentence an image; all begin with the same word ids."""
        state, images = self.start(image_state), len(image_state.image)
        log_prob = torch.zeros(images, device=self.device)
        words = torch.full((images, 1), END, device=self.device)
        for word in prefix:
            log_probs, state = self.step(state, words[:, -1])
            log_prob = log_prob + log_probs[:, word]
            words = torch.cat([words, torch.full_like(words[:, :1], word)], 1)
        return Hypotheses(log_prob, words, state)

    @torch.inference_mode()
    def step(self, state: DecoderState, words: Tensor) -> tuple[Tensor, DecoderState]:
        """Reads a word a row.

        Args:
            state: of the rows so far.
            words: `[rows] int64`; END to begin.

        Returns:
            The log-probabilities of the next word, `[rows, vocabulary_size] float32`, and the state after this one.
        """

        def of_rows(values: Tensor) -> Tensor:
            return values if state.parent is None else values.index_select(0, state.parent)

        layers, states = len(self._hiddens), self._model.state_count
        hs, cs = state.memory[:layers], state.memory[layers:states]
        new_hs: list[Tensor] = []
        new_cs: list[Tensor] = []
        gates = self._gates_of_word.index_select(0, words)
        if state.image is not None:
            gates += of_rows(state.image)
        if self._attention is not None:
            gates += of_rows(self._attention.to_gates(state.memory[states]))
        for layer, h in enumerate(hs):
            if layer:
                gates = self._inputs[layer - 1](new_hs[-1])
            gates += of_rows(self._hiddens[layer](h))
            new_h, new_c = advance(gates, of_rows(cs[layer]) if cs else None)
            new_hs.append(new_h)
            new_cs += [] if new_c is None else [new_c]
        image = state.image if self._model.config.image_input == "every_step" else None
        image = None if image is None else of_rows(image)
        top, memory, looks = new_hs[-1], (*new_hs, *new_cs), None
        if self._attention is not None and state.looks is not None and state.annotations is not None:
            looks = of_rows(state.looks)
            seen, _ = self._attention(top, state.annotations, self._attention.find_slots(looks, len(state.annotations)))
            top, memory = top + self._attention.to_output(seen), (*memory, seen)
        log_probs = torch.log_softmax(self._output(top), 1, dtype=torch.float32)
        return log_probs, DecoderState(memory, image, looks, state.annotations)
