"""The recurrences of a captioner over packed sentences: `torch.nn`'s weights, run tick by tick.

h_t = max(0, Wxh x_t + Whh h_{t-1} + b)       or the gates of an LSTM; any number of layers
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from captionlib.models.captioners.attention import Attention

__all__ = ["advance", "recur", "recur_attending", "recur_fused"]


def recur(
    recurrence: nn.RNNBase, dropout: nn.Module, inputs: Tensor, sizes: list[int], state: Tensor
) -> tuple[Tensor, Tensor]:
    """Runs a recurrence over packed sentences.

    Args:
        recurrence: an `nn.LSTM`, or an `nn.RNN` of rectifiers.
        dropout: between its layers.
        inputs: `[tokens, embedding_size]`, tick by tick.
        sizes: how many sentences reach each tick; never more than reached the one before.
        state: `[states, sentences, hidden_size]` to begin with: the h of each layer, then, of an LSTM, the c of each.

    Returns:
        The last layer's h, `[tokens, hidden_size]`, and the state of the sentences that reach the last tick.
    """
    if inputs.is_cuda:
        return recur_fused(recurrence, inputs, sizes, state)
    hs, cs = _split_state(recurrence, state)
    for layer, (w_ih, w_hh, b_ih, b_hh) in enumerate(recurrence.all_weights):
        if layer:
            inputs = dropout(inputs)
        h, c = hs[layer], cs[layer]
        ticks = []
        for x in torch.split(F.linear(inputs, w_ih, b_ih + b_hh), sizes):
            h, c = advance(torch.addmm(x, h[: len(x)], w_hh.t()), None if c is None else c[: len(x)])
            ticks.append(h)
        inputs = torch.cat(ticks)
        hs[layer], cs[layer] = h, c
    return inputs, torch.stack([*hs, *(c for c in cs if c is not None)])


def recur_fused(recurrence: nn.RNNBase, inputs: Tensor, sizes: list[int], state: Tensor) -> tuple[Tensor, Tensor]:
    """The same by cuDNN; on a CPU PyTorch's own loop over packed sequences takes half again as long as `recur`."""
    packed = PackedSequence(inputs, torch.tensor(sizes))
    if isinstance(recurrence, nn.LSTM):
        h, c = state.contiguous().chunk(2)
        outputs, (h, c) = recurrence(packed, (h, c))
        state = torch.cat([h, c])
    else:
        outputs, state = recurrence(packed, state.contiguous())
    return outputs.data, state[:, : sizes[-1]]


def recur_attending(
    recurrence: nn.RNNBase,
    dropout: nn.Module,
    attention: Attention,
    inputs: Tensor,
    sizes: list[int],
    state: Tensor,
    annotations: Tensor,
    image: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, looking at the image after each tick: what it sees goes to the output and into the next tick.

    Args:
        recurrence: an `nn.LSTM`, or an `nn.RNN` of rectifiers.
        dropout: between its layers.
        attention: how it looks.
        inputs: `[tokens, embedding_size]`, tick by tick.
        sizes: how many sentences reach each tick; never more than reached the one before.
        state: `[states, sentences, hidden_size]` to begin with.
        annotations: `[images, positions, size]`, from `Attention.embed`.
        image: `[sentences] int64`, the row of `annotations` that a sentence is about.

    Returns:
        What the output sees, `[tokens, hidden_size]`; the state of the sentences that reach the last tick; and where
        each token's look went, `[tokens, positions]`.
    """
    hs, cs = _split_state(recurrence, state)
    slots = attention.find_slots(image, len(annotations))
    (w_ih, _, b_ih, b_hh), *_ = weights = recurrence.all_weights
    context, _ = attention(hs[-1], annotations, slots)
    hiddens, contexts, looks = [], [], []
    for x in torch.split(F.linear(inputs, w_ih, b_ih + b_hh), sizes):
        rows = len(x)
        h, gates = x, x + attention.to_gates(context[:rows])
        for layer, (w_ih, w_hh, b_ih, b_hh) in enumerate(weights):
            if layer:
                gates = F.linear(dropout(h), w_ih, b_ih + b_hh)
            before = cs[layer]
            gates = torch.addmm(gates, hs[layer][:rows], w_hh.t())
            h, cs[layer] = advance(gates, None if before is None else before[:rows])
            hs[layer] = h
        context, look = attention(h, annotations, slots.first(rows))
        hiddens.append(h)
        contexts.append(context)
        looks.append(look)
    state = torch.stack([*hs, *(c for c in cs if c is not None)])
    return torch.cat(hiddens) + attention.to_output(torch.cat(contexts)), state, torch.cat(looks)


def advance(gates: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """One tick of a layer: the state after it, from Wxh x + Whh h + b.

    Args:
        gates: `[rows, hidden_size]` of an RNN; `[rows, 4 * hidden_size]` of an LSTM: input, forget, cell, output gate.
        c: `[rows, hidden_size]` of an LSTM, None of an RNN.

    Returns:
        h and c, `[rows, hidden_size]` each.
    """
    if c is None:
        return torch.relu(gates), None
    i, f, g, o = gates.chunk(4, dim=1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _split_state(recurrence: nn.RNNBase, state: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
    """The h of each layer, and its c, None of an RNN."""
    layers = recurrence.num_layers
    parts = list(state.unbind())
    return parts[:layers], [*parts[layers:]] if len(parts) > layers else [None] * layers
