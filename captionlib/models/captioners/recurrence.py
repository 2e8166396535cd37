"""The recurrent layers of a captioner, with the weights of `torch.nn.LSTM` or `torch.nn.RNN`.

Each layer computes h_t = max(0, Wxh x_t + Whh h_{t-1} + b), or the LSTM equations. There may be any number of layers.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from captionlib.models.captioners.attention import Attention, group_by_image

__all__ = ["RecurrenceOutput", "run_fused", "run_recurrence", "step_layers"]


class RecurrenceOutput(NamedTuple):
    """The result of running the layers over packed sentences.

    Attributes:
        hidden: `[tokens, hidden_size]`, the last layer's h; with attention, plus the projected context vector.
        state: `[states, sentences that reach the last step, hidden_size]`: h of each layer, then c of each LSTM layer.
            A Transformer captioner also returns this tuple, with a state of
            `[states, sentences, steps, hidden_size]`: the keys of all layers, then the values of all layers.
        attention_weights: `[tokens, positions] float32`; None without attention.
    """

    hidden: Tensor
    state: Tensor
    attention_weights: Tensor | None


def run_recurrence(
    rnn: nn.RNNBase,
    dropout: nn.Module,
    inputs: Tensor,
    batch_sizes: list[int],
    state: Tensor,
    image_gates: Tensor | None = None,
    attention: Attention | None = None,
    annotations: Tensor | None = None,
    image_of_caption: Tensor | None = None,
) -> RecurrenceOutput:
    """Runs the recurrence over packed sentences.

    The context vector of a time step is added to the output of this step and to the gates of the next step, with a
    different projection for each.

    Args:
        rnn: an `nn.LSTM`, or an `nn.RNN` with ReLU units.
        dropout: module applied between the layers.
        inputs: `[tokens, embedding_size]`, ordered by time step.
        batch_sizes: the number of sentences that reach each time step, in non-increasing order.
        state: `[states, sentences, hidden_size]` before the first time step: the h of each layer, then the c of each
            layer of an LSTM.
        image_gates: `[rows, gates]`, for each of the first `rows` tokens, the projection of its sentence's image. It is
            added to the gates of the first layer.
        attention: attention module, which requires the next two arguments; None for no attention.
        annotations: `[images, positions, attention_size]`, annotation vectors from `Attention.annotate`.
        image_of_caption: `[sentences] int64`, the row of `annotations` that each sentence attends to.
    """
    if attention is None or annotations is None or image_of_caption is None:
        attention = None
        if inputs.is_cuda and image_gates is None:
            return run_fused(rnn, inputs, batch_sizes, state)
    else:
        groups = group_by_image(image_of_caption, len(annotations))
    (w_ih, first_w_hh, b_ih, b_hh), *upper = layers = rnn.all_weights
    # The recurrent weight of the first layer is detached, because `_RecurrentWeights` computes its gradient.
    recurrent = [first_w_hh.detach().t(), *(w_hh.t() for _, w_hh, _, _ in upper)]
    feed_forward = [_create_feed_forward(dropout, w_ih, b_ih + b_hh) for w_ih, _, b_ih, b_hh in upper]
    h, c = list(state[: len(layers)]), list(state[len(layers) :])
    previous: list[Tensor] = []  # h_{t-1} of the first layer for each time step
    hiddens, contexts, weights = [], [], []
    if attention is not None:
        context, _ = attention(h[-1], annotations, groups)
    all_gates = F.linear(inputs, w_ih, b_ih + b_hh)
    if image_gates is not None:
        rows = len(image_gates)
        all_gates = torch.cat([all_gates[:rows] + image_gates, all_gates[rows:]])
    all_gates = _RecurrentWeights.apply(all_gates, first_w_hh, previous)
    for input_gates in torch.split(all_gates, batch_sizes):
        rows = len(input_gates)  # sentences that reach this time step
        previous.append(h[0][:rows].detach())
        gates = input_gates if attention is None else input_gates + attention.to_gates(context[:rows])
        recurrent_gates = [h_l[:rows] @ w_hh for h_l, w_hh in zip(h, recurrent, strict=True)]
        h, c = step_layers(gates, recurrent_gates, [c_l[:rows] for c_l in c], feed_forward)
        hiddens.append(h[-1])
        if attention is not None:
            context, step_weights = attention(h[-1], annotations, groups.head(rows))
            contexts.append(context)
            weights.append(step_weights)
    hidden, state = torch.cat(hiddens), torch.stack([*h, *c])
    if attention is None:
        return RecurrenceOutput(hidden, state, None)
    return RecurrenceOutput(hidden + attention.to_output(torch.cat(contexts)), state, torch.cat(weights))


class _RecurrentWeights(torch.autograd.Function):
    """Computes the gradient of the recurrent weights of the first layer with one matrix product for all time steps.

    Autograd would compute this gradient at every time step and sum the results, each as large as the weight matrix.
    The forward pass returns the gates unchanged.
    """

    @staticmethod
    def forward(ctx: Any, gates: Tensor, weight: Tensor, previous: list[Tensor]) -> Tensor:
        """Takes the gates before Whh h_{t-1} is added, and a list to which the caller appends h_{t-1} of each step."""
        ctx.previous, ctx.dtype = previous, weight.dtype
        return gates.view_as(gates)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (gradient,) = gradients
        if not ctx.needs_input_grad[1]:
            return gradient, None, None
        previous = torch.cat(ctx.previous).to(gradient.dtype)
        return gradient, (gradient.t() @ previous).to(ctx.dtype), None


def run_fused(rnn: nn.RNNBase, inputs: Tensor, batch_sizes: list[int], state: Tensor) -> RecurrenceOutput:
    """Runs a recurrence without attention or image gates. Uses PyTorch's fused kernels, which are slow on a CPU."""
    packed = PackedSequence(inputs, torch.tensor(batch_sizes))
    if isinstance(rnn, nn.LSTM):
        h, c = state.contiguous().chunk(2)
        outputs, (h, c) = rnn(packed, (h, c))
        state = torch.cat([h, c])
    else:
        outputs, state = rnn(packed, state.contiguous())
    return RecurrenceOutput(outputs.data, state[:, : batch_sizes[-1]], None)


def step_layers(
    gates: Tensor,
    recurrent_gates: Sequence[Tensor],
    cells: Sequence[Tensor],
    feed_forward: Sequence[Callable[[Tensor], Tensor]],
) -> tuple[list[Tensor], list[Tensor]]:
    """Computes one time step of all layers.

    Args:
        gates: `[rows, gates]`, pre-activations Wxh x + b of the first layer. The `gates` axis is 4 * hidden_size for an
            LSTM (ordered input, forget, cell, output), hidden_size for an RNN.
        recurrent_gates: Whh h_{t-1} of each layer, `[rows, gates]`; these tensors are overwritten.
        cells: c_{t-1} of each layer, `[rows, hidden_size]`; empty for an RNN.
        feed_forward: one function per layer above the first; computes Wxh x + b from the h of the layer below.

    Returns:
        h and c of each layer, `[rows, hidden_size]`; no c for an RNN.
    """
    new_h: list[Tensor] = []
    new_c: list[Tensor] = []
    for layer, recurrent in enumerate(recurrent_gates):
        from_below = feed_forward[layer - 1](new_h[-1]) if layer else gates
        total = recurrent.add_(from_below)
        if not cells:
            new_h.append(torch.relu(total))
            continue
        i, f, g, o = total.chunk(4, dim=1)
        c = torch.sigmoid(f) * cells[layer] + torch.sigmoid(i) * torch.tanh(g)
        new_h.append(torch.sigmoid(o) * torch.tanh(c))
        new_c.append(c)
    return new_h, new_c


def _create_feed_forward(dropout: nn.Module, weight: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda h: F.linear(dropout(h), weight, bias)
