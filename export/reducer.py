"""The reducing graph: maps -> the sums of `daemon.score.Reduced`, on the device that holds the maps.

It is `daemon.score.reduce_maps` written a second time, in torch, and exported to a few kilobytes of ONNX that travel inside
the model file. A GPU then copies back some kilobytes instead of seven maps.
"""

from __future__ import annotations

import warnings

import onnx
import torch
from onnx import ModelProto
from torch import Tensor, nn
from torch.nn import functional as F

from daemon.engines import OUTPUTS
from daemon.prepare import BUCKETS
from daemon.score import (
    GM_PROBABILITY,
    MIN_GM_ML,
    REGION_CELLS,
    RING_CELLS,
    RING_PROBABILITY,
    VOXEL_ML,
)
from export.graph import AXES, INPUT, OPSET, GraphError

INPUTS = (INPUT, *OUTPUTS, "masks", "affected_variance")
RESULTS = ("sums", "artefacts", "profile_r", "profile_a", "profile_s")

OPERATORS = frozenset(
    {
        "Add", "And", "Cast", "Clip", "Concat", "Constant", "Div", "Gather", "Greater", "GreaterOrEqual", "Identity", "Less", "Log",
        "Max", "MaxPool", "Mul", "Neg", "ReduceSum", "Reshape", "Slice", "Split", "Squeeze", "Sub", "Unsqueeze", "Where",
    }
)  # fmt: skip


class Reducer(nn.Module):
    """Sums over masks and along slices.

    Forward takes the image and the three outputs of the graph, `masks` (1, 2, D, H, W) float32 with the field of view and the
    head as 0 and 1, and `affected_variance` (1,). Returns `sums` (16,) in the order of `daemon.score.SUMS`, `artefacts` (2, 5)
    over the field of view and the region, and one profile (4, n) per axis.
    """

    def forward(
        self,
        image: Tensor,
        gm_probability: Tensor,
        task_variance: Tensor,
        artefact_variance: Tensor,
        masks: Tensor,
        affected_variance: Tensor,
    ) -> tuple[Tensor, ...]:
        """Reduce one volume."""
        p = gm_probability
        fov, head = torch.split(masks, [1, 1], dim=1)
        gm = (p > GM_PROBABILITY).float() * fov
        gm_cells = gm.sum((2, 3, 4), keepdim=True)
        grown = F.max_pool3d(gm, 2 * REGION_CELLS + 1, 1, REGION_CELLS) * fov
        enough = (gm_cells * VOXEL_ML >= MIN_GM_ML).float()
        region = enough * grown + (1.0 - enough) * head
        ring = F.max_pool3d(gm, 2 * RING_CELLS + 1, 1, RING_CELLS) * fov * (p < RING_PROBABILITY).float()
        gm_intensity = (gm * image).sum((2, 3, 4), keepdim=True)
        level = gm_intensity / gm_cells.clamp(min=1.0) + (gm_cells < 1.0).float() * 1e30
        bright = ring * (image > level).float()
        total = artefact_variance.sum(1, keepdim=True)
        q = p.clamp(1e-7, 1.0 - 1e-7)
        entropy = -(q * torch.log(q) + (1.0 - q) * torch.log(1.0 - q))
        affected = gm * (total > affected_variance).float()
        summed = torch.cat(
            [
                gm, region, head, task_variance * region, entropy * fov, entropy * region, p * fov, p * gm,
                p * (1.0 - p) * fov, torch.maximum(p, 1.0 - p) * head, gm * image, gm * image * image, ring, bright,
                bright * image, affected,
            ],
            dim=1,
        )  # fmt: skip
        sums = _sum_stepwise(summed)
        artefacts = torch.stack([_sum_stepwise(artefact_variance * fov), _sum_stepwise(artefact_variance * region)])
        rows = torch.cat([gm, head, region, region * total], dim=1)
        return sums, artefacts, _profile(rows, (3, 4)), _profile(rows, (2, 4)), _profile(rows, (2, 3))


def build_reducer() -> ModelProto:
    """Export the reducing graph with open spatial sizes.

    Raises:
        GraphError: an operator outside `OPERATORS`, or one that holds a spatial size.
    """
    shape = BUCKETS[0]
    # A tensor of its own for each input: the exporter takes one that is given twice for one input.
    channels = (1, 1, 1, 5, 2)
    inputs = (*(torch.rand((1, n, *shape)) for n in channels), torch.ones(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            Reducer().eval(), inputs, opset_version=OPSET, dynamo=True, verbose=False, external_data=False,
            input_names=list(INPUTS), output_names=list(RESULTS),
        )  # fmt: skip
    if program is None:
        raise GraphError("torch.onnx returned nothing")
    model: ModelProto = program.model_proto
    _open_sizes(model)
    found = {node.op_type for node in model.graph.node}
    if not found <= OPERATORS:
        raise GraphError(f"reducer: operators {sorted(found - OPERATORS)} are not on the list")
    onnx.checker.check_model(model, full_check=True)
    return model


def _sum_stepwise(values: Tensor) -> Tensor:
    """(C,) sums axis by axis: partial sums stay small, so float32 loses nothing that matters."""
    return values.sum(4).sum(3).sum(2).sum(0)


def _profile(rows: Tensor, axes: tuple[int, int]) -> Tensor:
    return rows.sum(axes).sum(0)


def _open_sizes(model: ModelProto) -> None:
    graph = model.graph
    graph.ClearField("value_info")
    graph.ClearField("metadata_props")
    graph.name = "rescan-reducer"
    for item in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        item.ClearField("metadata_props")
        item.ClearField("doc_string")
    for value in graph.input:
        dims = value.type.tensor_type.shape.dim
        if len(dims) == 5:
            for dim, name in zip(dims[2:], AXES, strict=True):
                dim.dim_param = name
    for value, name in zip(graph.output[2:], AXES, strict=True):
        value.type.tensor_type.shape.dim[1].dim_param = name
    model.ClearField("metadata_props")
    model.ClearField("doc_string")
    model.ClearField("functions")
    model.producer_name, model.producer_version = "rescan-export", ""
