"""The served graph: the student folded to plain operators, and what can be said about it without running it."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import onnx
import torch
from onnx import ModelProto, shape_inference
from torch import Tensor, nn
from torch.nn import functional as F

from daemon.engines import OUTPUTS
from training.network import LEAK, LOG_VARIANCE_MAX, LOG_VARIANCE_MIN, NetworkConfig, StandardConv, UNet, upsample

OPSET = 18
"""Oldest that the exporter writes; Resize of opset 19 runs on CUDA only since ONNX Runtime 1.25 (onnxruntime PR 27415)."""

INPUT = "image"
AXES = ("D", "H", "W")

COMMON_OPERATORS = frozenset(
    {"Conv", "LeakyRelu", "MaxPool", "Concat", "Split", "Sigmoid", "Clip", "Exp", "Constant", "Identity"}
)
UPSAMPLING_OPERATORS = {
    "resize": frozenset({"Resize"}),
    "transpose": frozenset({"Pad", "ConvTranspose"}),
}
"""Operators allowed in a served graph; anything else fails the export. No normalisation over space, no loops, no Shape."""


class GraphError(Exception):
    """A graph that must not be served; the message names what is wrong with it."""


class Served(nn.Module):
    """The student as it is served: folded convolutions, calibrated probability, variances instead of their logarithms.

    Forward takes (1, 1, D, H, W) float32 and returns `gm_probability` (1, 1, ...), `task_variance` (1, 1, ...) and
    `artefact_variance` (1, 5, ...), float32.
    """

    def __init__(self, network: UNet, temperature: float, up: str) -> None:
        super().__init__()
        self.up = up
        self.down = nn.ModuleList(_plain_block(block) for block in network.down)
        self.squeeze = network.squeeze
        self.upward = nn.ModuleList(_plain_block(block) for block in network.upward)
        self.head = _one_head(network, temperature)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run one image."""
        x, skips = image, []
        for i, block in enumerate(self.down):
            x = block(x if i == 0 else F.max_pool3d(x, 2))
            skips.append(x)
        for i in reversed(range(len(self.upward))):
            x = _upsample(self.squeeze[i](x), self.up)
            x = self.upward[i](torch.cat([skips[i], x], dim=1))
        margin, log_variance = torch.split(self.head(x), [1, 6], dim=1)
        variance = torch.exp(torch.clamp(log_variance, LOG_VARIANCE_MIN, LOG_VARIANCE_MAX))
        task, artefacts = torch.split(variance, [1, 5], dim=1)
        return torch.sigmoid(margin), task, artefacts


@dataclass(frozen=True)
class GraphFacts:
    """What the card says about the graph.

    Attributes:
        operators: operator -> count.
        weights: number of weights.
        activation_bytes_per_voxel: largest sum of live activations, in float32, over the voxels of a bucket.
        gigaflops: bucket as "DxHxW" -> 1e9 operations of its convolutions, 2 per multiply-add.
    """

    operators: dict[str, int]
    weights: int
    activation_bytes_per_voxel: float
    gigaflops: dict[str, float]


def fold(network: UNet, temperature: float = 1.0, up: str = "resize") -> Served:
    """Fold a trained student into the module that is served.

    Args:
        network: student with 6 variance channels.
        temperature: divisor of the logits, > 0.
        up: form of the upsampling, the same function as the network's own whatever that is.

    Raises:
        GraphError: a teacher, or a temperature that is not positive.
    """
    if network.config.variances != 6:
        raise GraphError(
            f"expected a student with 6 variance channels, got {network.config.variances}; give student.pt"
        )
    if not temperature > 0:
        raise GraphError(f"temperature: expected a number above 0, got {temperature}")
    if up not in UPSAMPLING_OPERATORS:
        raise GraphError(f"upsampling: expected one of {', '.join(UPSAMPLING_OPERATORS)}, got {up!r}")
    return Served(network, temperature, up).eval()


def build_graph(served: Served, bucket: tuple[int, int, int]) -> ModelProto:
    """Export to ONNX with the three spatial sizes left open.

    Every operator works on any size, so the graph is traced at one bucket and its sizes are then named `D`, `H`, `W`; an
    engine fixes them when it loads a bucket. One set of weights, one graph, static shapes wherever it runs.

    Raises:
        GraphError: an operator outside the list, or one that holds a spatial size.
    """
    image = torch.zeros((1, 1, *bucket), dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            served, (image,), opset_version=OPSET, dynamo=True, verbose=False, external_data=False,
            input_names=[INPUT], output_names=list(OUTPUTS),
        )  # fmt: skip
    if program is None:
        raise GraphError("torch.onnx returned nothing")
    model: ModelProto = program.model_proto
    _clean(model)
    check_operators(model, served.up)
    onnx.checker.check_model(model, full_check=True)
    return model


def check_operators(model: ModelProto, up: str) -> None:
    """Hold the list of operators.

    Raises:
        GraphError: an operator outside it, another opset, or data outside the file.
    """
    allowed = COMMON_OPERATORS | UPSAMPLING_OPERATORS[up]
    found = {node.op_type for node in model.graph.node}
    if not found <= allowed:
        raise GraphError(f"operators {sorted(found - allowed)} are not on the list {sorted(allowed)}")
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    if opsets != {"": OPSET}:
        raise GraphError(f"opset: expected {OPSET} of the default domain alone, got {opsets}")
    if any(tensor.external_data for tensor in model.graph.initializer):
        raise GraphError("weights lie outside the file")


def graph_facts(model: ModelProto, buckets: tuple[tuple[int, int, int], ...]) -> GraphFacts:
    """Count operators, weights, live activations and operations."""
    shaped = {bucket: _shapes(model, bucket) for bucket in buckets}
    first = buckets[0]
    return GraphFacts(
        operators=dict(sorted(Counter(node.op_type for node in model.graph.node).items())),
        weights=sum(int(np.prod(t.dims)) for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT),
        activation_bytes_per_voxel=_live_bytes(model, shaped[first]) / float(np.prod(first)),
        gigaflops={"x".join(map(str, b)): round(_gigaflops(model, shaped[b]), 3) for b in buckets},
    )


def fix_sizes(model: ModelProto, bucket: tuple[int, int, int]) -> ModelProto:
    """A copy with the spatial sizes fixed and every intermediate shape inferred."""
    fixed = ModelProto()
    fixed.CopyFrom(model)
    sizes = dict(zip(AXES, bucket, strict=True))
    for value in (*fixed.graph.input, *fixed.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]
    return shape_inference.infer_shapes(fixed, strict_mode=True)


def _plain_block(block: nn.Module) -> nn.Sequential:
    first, second = block.get_submodule("first"), block.get_submodule("second")
    return nn.Sequential(_plain(first), nn.LeakyReLU(LEAK), _plain(second), nn.LeakyReLU(LEAK))


def _plain(conv: nn.Module) -> nn.Conv3d:
    if not isinstance(conv, StandardConv):
        raise GraphError(f"expected a StandardConv, got {type(conv).__name__}; the exporter and the network differ")
    weight = conv.folded().detach()
    plain = nn.Conv3d(weight.shape[1], weight.shape[0], 3, padding=1)
    plain.weight = nn.Parameter(weight)
    plain.bias = nn.Parameter(conv.bias.detach())
    return plain


def _one_head(network: UNet, temperature: float) -> nn.Conv3d:
    """Both heads as one 1x1x1 convolution: the margin of the two logits over the temperature, then 6 log-variances.

    Softmax over two classes is the sigmoid of their margin: exp(b) / (exp(a) + exp(b)) = 1 / (1 + exp(a - b)).
    """
    logits, variance = network.logits, network.log_variance
    if logits.bias is None or variance.bias is None:
        raise GraphError("the heads have no bias; the exporter and the network differ")
    margin = (logits.weight[1:] - logits.weight[:1]) / temperature
    offset = (logits.bias[1:] - logits.bias[:1]) / temperature
    head = nn.Conv3d(margin.shape[1], 7, 1)
    head.weight = nn.Parameter(torch.cat([margin, variance.weight]).detach())
    head.bias = nn.Parameter(torch.cat([offset, variance.bias]).detach())
    return head


def _upsample(x: Tensor, form: str) -> Tensor:
    if form == "resize":
        return upsample(x, form)
    # The crop of the network's own form, taken by the padding of the operator: no Slice, whose ends would hold sizes.
    c = x.shape[1]
    line = x.new_tensor([0.25, 0.75, 0.75, 0.25])
    kernel = (line[:, None, None] * line[None, :, None] * line[None, None, :]).expand(c, 1, 4, 4, 4).contiguous()
    return F.conv_transpose3d(F.pad(x, (1,) * 6, mode="replicate"), kernel, stride=2, padding=3, groups=c)


def _clean(model: ModelProto) -> None:
    """Drop what the exporter says about this machine and name the spatial sizes."""
    graph = model.graph
    graph.ClearField("value_info")
    graph.ClearField("metadata_props")
    graph.ClearField("doc_string")
    graph.name = "rescan-student"
    for item in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        item.ClearField("metadata_props")
        item.ClearField("doc_string")
    for value in (*graph.input, *graph.output):
        dims = value.type.tensor_type.shape.dim
        for dim, name in zip(dims[2:], AXES, strict=True):
            dim.dim_param = name
    model.ClearField("metadata_props")
    model.ClearField("doc_string")
    model.ClearField("functions")
    model.producer_name, model.producer_version = "rescan-export", ""


def _shapes(model: ModelProto, bucket: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
    graph = fix_sizes(model, bucket).graph
    values = (*graph.input, *graph.output, *graph.value_info)
    shapes = {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in values}
    weights = {t.name: tuple(t.dims) for t in graph.initializer}
    missing = {name for node in graph.node for name in node.output if not all(shapes.get(name, (0,)))}
    constants = {name for node in graph.node if node.op_type == "Constant" for name in node.output}
    if missing - constants:
        raise GraphError(f"the sizes of {sorted(missing - constants)[:3]} do not follow from those of the input")
    return shapes | weights


def _live_bytes(model: ModelProto, shapes: dict[str, tuple[int, ...]]) -> float:
    """Largest sum of activations that are live at once, in the stored order, float32."""
    nodes = model.graph.node
    last_use = {name: i for i, node in enumerate(nodes) for name in node.input}
    last_use |= {value.name: len(nodes) for value in model.graph.output}
    live = {INPUT}
    peak = 0.0
    for i, node in enumerate(nodes):
        live |= {name for name in node.output if name in last_use}
        peak = max(peak, sum(4.0 * float(np.prod(shapes[name])) for name in live))
        live = {name for name in live if last_use.get(name, -1) > i}
    return peak


def _gigaflops(model: ModelProto, shapes: dict[str, tuple[int, ...]]) -> float:
    total = 0.0
    for node in model.graph.node:
        if node.op_type == "Conv":
            out, weight = shapes[node.output[0]], shapes[node.input[1]]
            total += 2.0 * float(np.prod(out)) * float(np.prod(weight[1:]))
    return total / 1e9


def random_student(widths: tuple[int, ...] = (8, 12, 16), seed: int = 0) -> UNet:
    """A student with random weights that gives plausible maps: for tests and benchmarks, never shipped."""
    torch.manual_seed(seed)
    network = UNet(NetworkConfig(widths=widths)).eval()
    nn.init.normal_(network.log_variance.weight, std=0.5)
    return network


def save_bytes(model: ModelProto) -> bytes:
    """Serialise; the same model gives the same bytes."""
    buffer = BytesIO()
    buffer.write(model.SerializeToString(deterministic=True))
    return buffer.getvalue()
