"""Base + adapter to an ordinary Hugging Face folder, tensor by tensor into shards.

    source -> transform(name, tensor) -> writer      an adapted W becomes g (W + s B A) (DoRA) or W + s B A (LoRA)

Nothing is kept: each tensor is written as it comes, and peak memory is about two tensors. What W is, and what becomes
of an adapter that began by undoing the quantization error, see `adapted_source`. The result is written in float32
arithmetic with one rounding to the output dtype. Merging and quantizing again, as others offer, is `bnb`'s: it rounds
the update onto the 4-bit grid again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from qlora.export.adapted_source import AdaptedSource, AdaptedWeights
from qlora.export.kept import Kept, prepared
from qlora.export.shards import in_dtype, write_into
from qlora.models.device import DTYPES
from qlora.specs import ExportSpec


def write_merged(found: AdaptedSource, spec: ExportSpec, folder: Path) -> None:
    """Write the merged model, which plain transformers loads, into an empty folder.

    Raises:
        UserError: the adapter does not fit its base, or that is not the one of the training; a value is beyond the
            range of `dtype`, or no finite number.
    """
    weights = AdaptedWeights(found, spec.base)
    form = found.written(spec, weights)

    def transform(parameter: str, value: Any) -> dict[str, Tensor]:
        layer = weights.layer_of(parameter, value)
        if layer is None:
            return {parameter: in_dtype(parameter, value, form.dtype)}
        result = weights.merged(layer, weights.frozen(parameter, layer, value), form.dtype)
        in_dtype(parameter, result, form.dtype)
        return {parameter: result.t().contiguous() if layer in weights.layers.transposed else result}

    write_into(
        folder, found.source, transform, form, found.tokenizer, prepare=weights.prepare, finish=weights.check_all
    )


def keep_merged(found: AdaptedSource, spec: ExportSpec) -> Kept:
    """What `write_merged` keeps: everything in one dtype."""
    weights, dtype = prepared(found, spec.base), DTYPES[spec.dtype]
    return Kept(
        found,
        weights,
        layer=lambda layer, weight: weights.merged(layer, weight, dtype),
        other=lambda name, value: value.to(dtype),
    )
