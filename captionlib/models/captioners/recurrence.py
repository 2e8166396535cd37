"""The recurrent layers of a captioner, with the weights of `torch.nn.LSTM` or `torch.nn.RNN`.

Each layer computes h_t = max(0, Wxh x_t + Whh h_{t-1} + b), or the LSTM equations.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from captionlib.models.captioners.attention import Attention, group_by_image

__all__ = ["RecurrenceOutput", "run_fused", "run_recurrence", "step_layers"]


class RecurrenceOutput(NamedTuple):
    """The output of the layers for packed sentences.

    Attributes:
        hidden: `[tokens, hidden_size]`, the last layer's h; with attention, plus the projected context vector.
        state: `[states, sentences that reach the last step, hidden_size]`: h of each layer, then c of each LSTM layer.
            For a Transformer, `[states, sentences, steps, hidden_size]`: keys of each layer, then values of each layer.
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
    image_projections: Tensor | None = None,
    attention: Attention | None = None,
    annotations: Tensor | None = None,
    image_of_caption: Tensor | None = None,
) -> RecurrenceOutput:
    """Runs the recurrence over packed sentences.

    Two projections of the context vector are added: one to the output of its time step, and one to the gates of the
    next time step.

    Args:
        rnn: an `nn.LSTM`, or an `nn.RNN` with ReLU units.
        dropout: module applied between the layers.
        inputs: `[tokens, embedding_size]`, ordered by time step.
        batch_sizes: the number of sentences that reach each time step, in non-increasing order.
        state: `[states, sentences, hidden_size]` before the first time step: the h of each layer, then the c of each
            layer of an LSTM.
        image_projections: `[rows, gates]`, added to the first layer's gates for each of the first `rows` tokens.
        attention: attention module, which requires the next two arguments; None for no attention.
        annotations: `[images, positions, attention_size]`, annotation vectors from `Attention.annotate`.
        image_of_caption: `[sentences] int64`, the row of `annotations` that each sentence attends to.
    """
    if attention is None or annotations is None or image_of_caption is None:
        attention = None
        if inputs.is_cuda and image_projections is None:
            return run_fused(rnn, inputs, batch_sizes, state)
    else:
        groups = group_by_image(image_of_caption, len(annotations))
    (w_ih, first_w_hh, b_ih, b_hh), *upper = layers = rnn.all_weights
    # The recurrent weight of the first layer is detached, because `_RecurrentWeights` computes its gradient.
    recurrent = [first_w_hh.detach().t(), *(w_hh.t() for _, w_hh, _, _ in upper)]
    input_to_hidden = [partial(_project_input, dropout, w_ih, b_ih + b_hh) for w_ih, _, b_ih, b_hh in upper]
    h, c = list(state[: len(layers)]), list(state[len(layers) :])
    previous: list[Tensor] = []  # h_{t-1} of the first layer for each time step
    hiddens, contexts, weights = [], [], []
    if attention is not None:
        context, _ = attention(h[-1], annotations, groups)
    all_gates = F.linear(inputs, w_ih, b_ih + b_hh)
    if image_projections is not None:
        rows = len(image_projections)
        all_gates = torch.cat([all_gates[:rows] + image_projections, all_gates[rows:]])
    all_gates = _RecurrentWeights.apply(all_gates, first_w_hh, previous)
    for input_gates in torch.split(all_gates, batch_sizes):
        rows = len(input_gates)  # sentences that reach this time step
        previous.append(h[0][:rows].detach())
        gates = input_gates if attention is None else input_gates + attention.to_gates(context[:rows])
        recurrent_gates = [h_l[:rows] @ w_hh for h_l, w_hh in zip(h, recurrent, strict=True)]
        h, c = step_layers(gates, recurrent_gates, [c_l[:rows] for c_l in c], input_to_hidden)
        hiddens.append(h[-1])
        if attention is not None:
            context, step_weights = attention(h[-1], annotations, groups._replace(slots=groups.slots[:rows]))
            contexts.append(context)
            weights.append(step_weights)
    hidden, state = torch.cat(hiddens), torch.stack([*h, *c])
    if attention is None:
        return RecurrenceOutput(hidden, state, None)
    return RecurrenceOutput(hidden + attention.to_output(torch.cat(contexts)), state, torch.cat(weights))


class _RecurrentWeights(torch.autograd.Function):
    """Computes the gradient of the recurrent weights of the first layer with one matrix product for all time steps.

    Autograd would compute this gradient at every time step and sum the results, each as large as the weight matrix.
    The forward pass returns the gates unchanged. The caller then appends h_{t-1} of each time step to `previous`.
    """

    @staticmethod
    def forward(ctx: Any, gates: Tensor, weight: Tensor, previous: list[Tensor]) -> Tensor:
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
    """Uses PyTorch's fused kernels, which are slow on a CPU and support no attention or image projections."""
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
    input_to_hidden: Sequence[Callable[[Tensor], Tensor]],
) -> tuple[list[Tensor], list[Tensor]]:
    """Computes one time step of all layers.

    Args:
        gates: `[rows, gates]`, pre-activations Wxh x + b of the first layer. The `gates` axis is 4 * hidden_size for an
            LSTM (ordered input, forget, cell, output), hidden_size for an RNN.
        recurrent_gates: Whh h_{t-1} of each layer, `[rows, gates]`; these tensors are overwritten.
        cells: c_{t-1} of each layer, `[rows, hidden_size]`; empty for an RNN.
        input_to_hidden: for each layer above the first, the function Wxh x + b of the h of the layer below.

    Returns:
        h and c of each layer, `[rows, hidden_size]`; no c for an RNN.
    """
    new_h: list[Tensor] = []
    new_c: list[Tensor] = []
    for layer, recurrent in enumerate(recurrent_gates):
        total = recurrent.add_(input_to_hidden[layer - 1](new_h[-1]) if layer else gates)
        if not cells:
            new_h.append(torch.relu(total))
            continue
        i, f, g, o = total.chunk(4, dim=1)
        c = torch.sigmoid(f) * cells[layer] + torch.sigmoid(i) * torch.tanh(g)
        new_h.append(torch.sigmoid(o) * torch.tanh(c))
        new_c.append(c)
    return new_h, new_c


def _project_input(dropout: nn.Module, weight: Tensor, bias: Tensor, inputs: Tensor) -> Tensor:
    return F.linear(dropout(inputs), weight, bias)
