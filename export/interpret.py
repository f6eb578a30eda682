"""The served graph run by torch, operator by operator: the reference of parity, and torch's side of the benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import torch
from onnx import ModelProto, NodeProto, numpy_helper
from torch import Tensor
from torch.nn import functional as F

from daemon.engines import OUTPUTS
from daemon.words import Array
from export.graph import INPUT, GraphError


class TorchGraph:
    """A served graph in torch eager mode.

    Args:
        data: the bytes of a model file.
        dtype: of weights and activations; the head is always float32.
        channels_last: memory layout of the activations.
        device: where it runs.

    Raises:
        GraphError: an operator that a served graph may not have.
    """

    def __init__(
        self, data: bytes, dtype: torch.dtype = torch.float32, *, channels_last: bool = False, device: str = "cpu"
    ) -> None:
        model = ModelProto.FromString(data)
        unknown = {node.op_type for node in model.graph.node} - _OPERATORS.keys()
        if unknown:
            raise GraphError(
                f"operators {sorted(unknown)} are not on the list; give a file made by `rescan-export onnx`"
            )
        self._nodes = list(model.graph.node)
        self._dtype, self._device = dtype, device
        self._layout = torch.channels_last_3d if channels_last else torch.contiguous_format
        self._head = _head_weights(model)
        self._weights = {t.name: self._weight(t) for t in model.graph.initializer}
        self._last_use = {name: i for i, node in enumerate(self._nodes) for name in node.input}

    def run(self, image: Array) -> dict[str, Array]:
        """Run one prepared image.

        Args:
            image: (D, H, W) float32.

        Returns:
            Output name -> (channels, D, H, W) float32.
        """
        x = torch.from_numpy(image)[None, None].to(self._device)
        return {name: value[0].float().cpu().numpy() for name, value in self.forward(x).items()}

    @torch.inference_mode()
    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Run (1, 1, D, H, W) float32 on the device; tensors in and out stay there."""
        values: dict[str, Tensor] = {INPUT: image.to(self._dtype).contiguous(memory_format=self._layout)}
        kept = {*OUTPUTS}
        for i, node in enumerate(self._nodes):
            inputs = [values[n] if n in values else self._weights[n] for n in node.input if n]
            if any(name in self._head for name in node.input):
                inputs = [value.float() for value in inputs]
            out = _OPERATORS[node.op_type](inputs, _attributes(node))
            values.update(zip(node.output, out if isinstance(out, tuple) else (out,), strict=True))
            for name in node.input:
                if self._last_use.get(name) == i and name not in kept:
                    values.pop(name, None)
        return {name: values[name] for name in OUTPUTS}

    def _weight(self, tensor: onnx.TensorProto) -> Tensor:
        value = torch.from_numpy(numpy_helper.to_array(tensor).copy()).to(self._device)
        if not value.is_floating_point() or tensor.name in self._head:
            return value
        value = value.to(self._dtype)
        return value.contiguous(memory_format=self._layout) if value.ndim == 5 else value


def _head_weights(model: ModelProto) -> set[str]:
    """Names of the last convolution's weights: heads and what follows are computed in float32 whatever the trunk is."""
    last = [node for node in model.graph.node if node.op_type == "Conv"][-1]
    return set(last.input[1:])


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def _conv(inputs: list[Tensor], a: dict[str, Any]) -> Tensor:
    pads = a.get("pads", [0] * 6)
    bias = inputs[2] if len(inputs) > 2 else None
    return F.conv3d(inputs[0], inputs[1], bias, padding=tuple(pads[:3]), groups=a.get("group", 1))


def _conv_transpose(inputs: list[Tensor], a: dict[str, Any]) -> Tensor:
    pads, strides = a.get("pads", [0] * 6), a["strides"]
    bias = inputs[2] if len(inputs) > 2 else None
    return F.conv_transpose3d(
        inputs[0], inputs[1], bias, tuple(strides), padding=tuple(pads[:3]), groups=a.get("group", 1)
    )


def _max_pool(inputs: list[Tensor], a: dict[str, Any]) -> Tensor:
    return F.max_pool3d(inputs[0], tuple(a["kernel_shape"]), tuple(a["strides"]))


def _resize(inputs: list[Tensor], a: dict[str, Any]) -> Tensor:
    if a["mode"] != b"linear" or a["coordinate_transformation_mode"] not in (b"half_pixel", b"pytorch_half_pixel"):
        raise GraphError(f"Resize: expected linear with half-pixel centres, got {a}")
    return F.interpolate(inputs[0], scale_factor=2, mode="trilinear", align_corners=False)


def _clip(inputs: list[Tensor], _: dict[str, Any]) -> Tensor:
    return torch.clamp(inputs[0], float(inputs[1]), float(inputs[2]))


def _split(inputs: list[Tensor], a: dict[str, Any]) -> tuple[Tensor, ...]:
    return torch.split(inputs[0], [int(n) for n in inputs[1]], dim=a["axis"])


def _constant(_: list[Tensor], a: dict[str, Any]) -> Tensor:
    return torch.from_numpy(numpy_helper.to_array(a["value"]).copy())


_Operator = Callable[[list[Tensor], dict[str, Any]], Tensor | tuple[Tensor, ...]]
_OPERATORS: dict[str, _Operator] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "MaxPool": _max_pool,
    "Resize": _resize,
    "Clip": _clip,
    "Split": _split,
    "Constant": _constant,
    "LeakyRelu": lambda x, a: F.leaky_relu(x[0], a.get("alpha", 0.01)),
    "Concat": lambda x, a: torch.cat(x, dim=a["axis"]),
    "Sigmoid": lambda x, _: torch.sigmoid(x[0]),
    "Exp": lambda x, _: torch.exp(x[0]),
    "Identity": lambda x, _: x[0],
    "Pad": lambda x, _: F.pad(x[0], (1,) * 6, mode="replicate"),
}
