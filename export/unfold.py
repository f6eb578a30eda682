"""Model file -> checkpoint: the way back from `export.graph.fold`, so that a served student can be trained further."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import torch
from onnx import ModelProto, numpy_helper
from torch import Tensor, nn

from export.graph import GraphError
from training.network import NetworkConfig, StandardConv, UNet


def unfold(model: ModelProto, temperature: float) -> UNet:
    """A student that computes what this graph computes, to float32 rounding.

    Its parameters need not be those that were folded: a filter's length and the common part of two logits do not matter to
    the output and are not in the graph.

    Args:
        model: a graph of `export.graph.build_graph`.
        temperature: the divisor of the logits that it holds (in the card).

    Raises:
        GraphError: the weights are not those of a student.
    """
    convs = iter(_convolutions(model))
    try:
        network = UNet(NetworkConfig(_widths(model)))
        for block in network.down:
            _unfold_block(block, convs)
        for squeeze, block in reversed(list(zip(network.squeeze, network.upward, strict=True))):
            weight, bias = next(convs)
            squeeze.load_state_dict({"weight": weight, "bias": bias})
            _unfold_block(block, convs)
        _unfold_head(network, *next(convs), temperature)
    except (StopIteration, RuntimeError) as error:
        raise GraphError(f"not the graph of a student ({error}); give a file made by rescan-export onnx") from error
    return network.eval()


def _convolutions(model: ModelProto) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias of every convolution, in the order in which they run; a bias of zeros is not stored."""
    stored = {t.name: torch.from_numpy(np.array(numpy_helper.to_array(t))) for t in model.graph.initializer}
    found = []
    for node in model.graph.node:
        if node.op_type == "Conv":
            weight = stored[node.input[1]]
            found.append((weight, stored[node.input[2]] if len(node.input) > 2 else weight.new_zeros(len(weight))))
    return found


def _widths(model: ModelProto) -> tuple[int, ...]:
    """Channels per level, finest first: those that come out of the encoder's blocks, two convolutions each.

    A student of n levels has 2 n convolutions in the encoder, 3 (n - 1) in the decoder and its head.
    """
    biases = [bias for _, bias in _convolutions(model)]
    levels = (len(biases) + 2) // 5
    if levels < 1 or len(biases) != 5 * levels - 2:
        raise RuntimeError(f"{len(biases)} convolutions")
    return tuple(len(bias) for bias in biases[1 : 2 * levels : 2])


def _unfold_block(block: nn.Module, convs: Iterator[tuple[Tensor, Tensor]]) -> None:
    for part in ("first", "second"):
        conv = block.get_submodule(part)
        assert isinstance(conv, StandardConv)
        _unfold_filters(conv, *next(convs))


@torch.no_grad()
def _unfold_filters(conv: StandardConv, folded: Tensor, bias: Tensor) -> None:
    """Filters of the length they have when training begins; what they are longer or shorter by goes into the gain."""
    length = folded.square().mean(dim=(1, 2, 3, 4)).sqrt().clamp_min(1e-12)
    conv.weight.copy_(folded / length[:, None, None, None, None] * conv.scale)
    conv.gain.copy_(length / conv.scale)
    conv.bias.copy_(bias)


@torch.no_grad()
def _unfold_head(network: UNet, weight: Tensor, bias: Tensor, temperature: float) -> None:
    """Two logits of equal and opposite sign have the stored margin; the variances are as stored."""
    logits, variance = network.logits, network.log_variance
    assert logits.bias is not None and variance.bias is not None
    half = temperature / 2.0
    logits.weight.copy_(torch.cat([-weight[:1] * half, weight[:1] * half]))
    logits.bias.copy_(torch.cat([-bias[:1] * half, bias[:1] * half]))
    variance.weight.copy_(weight[1:])
    variance.bias.copy_(bias[1:])


def read_graph(data: bytes) -> ModelProto:
    """Parse a model file.

    Raises:
        GraphError: not ONNX.
    """
    try:
        return onnx.load_model_from_string(data)
    except Exception as error:
        raise GraphError(f"not an ONNX file ({error})") from error
