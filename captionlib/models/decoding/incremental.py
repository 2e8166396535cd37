"""Incremental decoding: one word per time step, with precomputed weights that make a step fast."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from captionlib.data.text.vocabulary import END
from captionlib.models.captioners.attention import group_by_image
from captionlib.models.captioners.captioner import CaptionerNetwork, ImageState
from captionlib.models.captioners.packed_sequences import pad_sentences
from captionlib.models.captioners.recurrence import step_layers

__all__ = ["Candidate", "DecoderState", "Hypotheses", "IncrementalCaptioner", "PackedLinear", "score_sentences"]

Module = TypeVar("Module", bound=nn.Module)

_MIN_PACKED_ROWS = 32  # with fewer rows oneDNN is not faster


@dataclass(frozen=True)
class Candidate:
    """One sentence of an n-best list."""

    token_ids: list[int]  # without END
    log_prob: float  # ln p(sentence | image), the sum over all tokens, without `length_penalty`
    token_count: int  # tokens that `log_prob` sums over: the words, and END unless the sentence was truncated


class DecoderState(NamedTuple):
    """The state of partial sentences. A parent is a prefix whose state is stored once for all its extensions.

    For a Transformer, `h` has the keys of all words, `[parents, words, hidden_size]`, and `c` their values. Without
    attention, `context`, `image` and `annotations` are None.
    """

    h: tuple[Tensor, ...]  # [parents, hidden_size] of each layer
    c: tuple[Tensor, ...]  # [parents, hidden_size] of each layer of an LSTM; empty for an RNN
    context: Tensor | None  # [parents, attention_size], the last context vector
    image_projections: Tensor | None  # [parents, gates], added to the gates; in a Transformer, to the word embedding
    image: Tensor | None  # [parents] int64, the image of each parent
    annotations: Tensor | None  # see `ImageState`
    parent: Tensor | None = None  # [rows] int64, the state row of each sentence; None if row i belongs to sentence i

    def select(self, rows: Tensor) -> "DecoderState":
        """Returns the state of the given rows, `[count] int64`; repeated rows share a parent."""
        if self.parent is not None:
            rows = self.parent.index_select(0, rows)
        kept, parent = torch.unique(rows, return_inverse=True)
        h, c = (tuple(values.index_select(0, kept) for values in layers) for layers in (self.h, self.c))
        context, image_projections, image = (
            None if values is None else values.index_select(0, kept)
            for values in (self.context, self.image_projections, self.image)
        )
        return DecoderState(h, c, context, image_projections, image, self.annotations, parent)

    def gather(self, values: Tensor) -> Tensor:
        """Expands values from one row per parent, `[parents, ...]`, to one row per sentence, `[rows, ...]`."""
        return values if self.parent is None else values.index_select(0, self.parent)


class Hypotheses(NamedTuple):
    """Partial sentences, one per row."""

    log_prob: Tensor  # [rows] float32
    words: Tensor  # [rows, 1 + words] int64; the first is END, which is also the start token
    state: DecoderState  # after all words except the last

    def select(self, rows: Tensor) -> "Hypotheses":
        return Hypotheses(self.log_prob[rows], self.words[rows], self.state.select(rows))


class IncrementalCaptioner:
    """A snapshot of a captioner that runs one word at a time. Later changes to the captioner's weights have no effect.

    For an RNN or LSTM, Wxh x + b of the first layer is precomputed for every word of the vocabulary, and Whh h is
    computed once for all sentences with the same parent.
    """

    @torch.inference_mode()
    def __init__(self, model: CaptionerNetwork, dtype: torch.dtype = torch.float32) -> None:
        self.device = model.output.weight.device
        self.dtype = dtype
        self._model = copy.deepcopy(model).eval()
        self._attention = None if model.attention is None else _pack_linears(model.attention, dtype)
        self._transformer = None if model.transformer is None else _pack_linears(model.transformer, dtype)
        self._output = PackedLinear(model.output.weight, model.output.bias, dtype)
        if model.transformer is not None:
            return
        (w_ih, _, b_ih, b_hh), *upper = layers = model.recurrence.all_weights
        self._word_gates = torch.addmm(b_ih + b_hh, model.word_vectors.weight, w_ih.t()).to(dtype)
        self._input_to_hidden = [PackedLinear(w_ih, b_ih + b_hh, dtype) for w_ih, _, b_ih, b_hh in upper]
        self._recurrent = [PackedLinear(w_hh, None, dtype) for _, w_hh, *_ in layers]

    @torch.inference_mode()
    def encode_images(self, features: Tensor) -> ImageState:
        return self._model.encode_images(features.to(self.device, torch.float32))

    @torch.inference_mode()
    def encode_mean_features(self) -> ImageState:
        return self._model.encode_mean_features()

    @torch.inference_mode()
    def initial_state(self, image_state: ImageState) -> DecoderState:
        """Returns the state before the first token, one row per image."""
        adds_image = self._model.config.image_input in ("first_step", "every_step")
        image_projections = image_state.projection.to(self.dtype) if adds_image else None
        layers = self._model.config.layers
        states = image_state.state.to(self.dtype).unbind()
        h, c = states[:layers], states[layers:]
        if image_state.annotations is None:
            return DecoderState(h, c, None, image_projections, None, None)
        annotations = image_state.annotations.to(self.dtype)
        image = torch.arange(len(image_state.features), device=self.device)
        context = None
        if self._attention is not None:
            context, _ = self._attention(h[-1], annotations, group_by_image(image, len(annotations)))
        return DecoderState(h, c, context, image_projections, image, annotations)

    @torch.inference_mode()
    def begin(self, image_state: ImageState, prefix: Sequence[int] = ()) -> Hypotheses:
        """Starts one sentence per image, all with the same prefix of token ids."""
        state, images = self.initial_state(image_state), len(image_state.features)
        log_prob = torch.zeros(images, device=self.device)
        words = torch.full((images, 1), END, device=self.device)
        for word in prefix:
            log_probs, state = self.step(state, words[:, -1])
            log_prob = log_prob + log_probs[:, word]
            words = torch.cat([words, torch.full_like(words[:, :1], word)], 1)
        return Hypotheses(log_prob, words, state)

    @torch.inference_mode()
    def step(self, state: DecoderState, words: Tensor) -> tuple[Tensor, DecoderState]:
        """Returns the log-probabilities of the next words, `[rows, vocabulary_size] float32`, and the new state.

        `words` are the previous words, `[rows] int64`; END at the first time step.
        """
        step = self._step_recurrence if self._transformer is None else self._step_transformer
        hidden, state = step(state, words)
        return _log_softmax(self._output(hidden)), state

    def _step_recurrence(self, state: DecoderState, words: Tensor) -> tuple[Tensor, DecoderState]:
        gates = self._word_gates.index_select(0, words)
        if state.image_projections is not None:
            gates += state.gather(state.image_projections)
        if self._attention is not None and state.context is not None:
            gates += state.gather(self._attention.to_gates(state.context))
        recurrent_gates = [state.gather(linear(h)) for linear, h in zip(self._recurrent, state.h, strict=True)]
        h, c = step_layers(gates, recurrent_gates, [state.gather(c) for c in state.c], self._input_to_hidden)
        image_projections = None  # from the second word on, only every_step adds the image
        if self._model.config.image_input == "every_step" and state.image_projections is not None:
            image_projections = state.gather(state.image_projections)
        hidden, context, image = h[-1], None, None
        if self._attention is not None and state.image is not None and state.annotations is not None:
            image = state.gather(state.image)
            context, _ = self._attention(hidden, state.annotations, group_by_image(image, len(state.annotations)))
            hidden = hidden + self._attention.to_output(context)
        return hidden, DecoderState(tuple(h), tuple(c), context, image_projections, image, state.annotations)

    def _step_transformer(self, state: DecoderState, words: Tensor) -> tuple[Tensor, DecoderState]:
        assert self._transformer is not None
        embeddings = self._model.word_vectors.weight.index_select(0, words).to(self.dtype)
        image = None if state.image is None else state.gather(state.image)
        projections = None if state.image_projections is None else state.gather(state.image_projections)
        past = [*state.h, *state.c]
        output = self._transformer(embeddings, [len(words)], past, state.annotations, image, state.parent, projections)
        layers = len(state.h)
        h, c = tuple(output.state[:layers]), tuple(output.state[layers:])
        return output.hidden, DecoderState(h, c, None, projections, image, state.annotations)


@torch.inference_mode()
def score_sentences(captioner: IncrementalCaptioner, image_state: ImageState, sentences: Sequence[Candidate]) -> Tensor:
    """Computes the log-probability of each sentence given a single image, `[sentences] float32`.

    Common prefixes are computed once. Sentences may come from other images; their own `log_prob` is ignored.
    """
    device = captioner.device
    if not sentences:
        return torch.zeros(0, device=device)
    lengths = torch.tensor([sentence.token_count for sentence in sentences], device=device)
    tokens = pad_sentences([[*sentence.token_ids, END][: sentence.token_count] for sentence in sentences]).to(device)
    total = torch.zeros(len(sentences), device=device)
    state, words = captioner.initial_state(image_state), torch.tensor([END], device=device)
    remaining = torch.arange(len(sentences), device=device)  # sentences with a token at this time step
    row = torch.zeros_like(remaining)  # state row that holds the prefix of each remaining sentence
    for step in range(tokens.shape[1]):
        log_probs, state = captioner.step(state, words)
        token = tokens[remaining, step]
        total[remaining] += log_probs[row, token]
        continues = lengths[remaining] > step + 1
        remaining, vocabulary_size = remaining[continues], log_probs.shape[1]
        prefixes, row = torch.unique(row[continues] * vocabulary_size + token[continues], return_inverse=True)
        state, words = state.select(prefixes // vocabulary_size), prefixes % vocabulary_size
    return total


def _log_softmax(logits: Tensor) -> Tensor:
    """Returns log-probabilities, `[rows, vocabulary_size] float32`. The logits may be overwritten."""
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        return torch.log_softmax(logits, 1, out=logits)  # allocating memory would take as long as the computation
    return torch.log_softmax(logits, 1, dtype=torch.float32)


def _pack_linears(module: Module, dtype: torch.dtype) -> Module:
    """Returns a snapshot of a module in which each `nn.Linear` is a `PackedLinear`."""
    packed = copy.deepcopy(module).eval().to(dtype)
    for parent in list(packed.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, PackedLinear(child.weight, child.bias, dtype))
    return packed


class PackedLinear(nn.Module):
    """A snapshot of a linear layer.

    On a CPU, oneDNN multiplies many float32 rows by weights in its packed layout, in half the time of a BLAS that does
    not use the processor's widest vector instructions. The operators are those that torch.compile emits, because they
    accept and return tensors in the ordinary layout.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        weight = weight.detach().to(dtype)
        self._transposed = weight.t().clone(memory_format=torch.contiguous_format)
        self._bias = None if bias is None else bias.detach().to(dtype, copy=True)
        self._packed: Tensor | None = None
        if dtype == torch.float32 and weight.device.type == "cpu" and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)

    def forward(self, rows: Tensor) -> Tensor:
        if self._packed is None or len(rows) < _MIN_PACKED_ROWS:
            return rows @ self._transposed if self._bias is None else torch.addmm(self._bias, rows, self._transposed)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._packed, self._bias, "none", [], "")
        return product
