"""One linear layer as a model, of every kind that can be adapted, with its dense weight."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qlora import adapter_parameters
from qlora.layers import nf4
from qlora.layers.linear import NF4Linear


class OneLayer(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def one_layer(
    kind: str, columns: int, out: int, bias: bool = True, dtype=torch.float64
) -> tuple[OneLayer, torch.Tensor]:
    """A model of one linear layer, and its dense weight in float64."""
    W = torch.randn(out, columns)
    if kind == "nf4":
        layer = NF4Linear(columns, out, bias)
        layer.quantized = nf4.quantize(W)
        W = nf4.dequantize(layer.quantized, torch.float64)
    elif kind == "conv1d":
        layer = Conv1D(out, columns)
        layer.weight.data = W.t().contiguous()
        layer = layer.to(dtype)
    else:
        layer = nn.Linear(columns, out, bias)
        layer.weight.data = W
        layer = layer.to(dtype)
    if layer.bias is not None:
        layer.bias.data = torch.randn(out, dtype=dtype)
    return OneLayer(layer), W.double()


def in_float64(model: OneLayer) -> OneLayer:
    for parameter in adapter_parameters(model):
        parameter.data = parameter.data.double()
    return model
