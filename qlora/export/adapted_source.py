"""An adapter and the base it belongs to, on disk: what every export reads.

    open_adapted(files) -> AdaptedSource            files of the adapter, place of the base, tokenizer
    AdaptedWeights(found, base)                     the base's tensors as they stream by, and what the adapter makes of
                                                    them: merged(...) = g (W + s B A), gain(...) = g = m / n

W is by default the dequantized NF4 weight, because the adapter was trained on that; `base="original"` is the
checkpoint's own weight instead. Of an adapter that began by undoing the quantization error (`start`) that beginning is
taken off there, since these weights have no such error:

    W + s (B A - B0 A0),   m ||W_j|| / m0_j in the place of m        so that an untrained adapter changes nothing

The alternative, to load the model and read its layers, holds it in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from qlora.data.chat import stop_ids
from qlora.errors import UserError, problem
from qlora.export.peft import AdapterFiles, adapter_tokenizer, file_key, put_adapter
from qlora.export.shards import CPU, Written, check_new_folder
from qlora.layers.adapters import merged_weight, row_norms
from qlora.layers.weight import FrozenWeight
from qlora.models.device import DTYPES, resolve_dtype
from qlora.models.info import BaseInfo
from qlora.models.load import load_source
from qlora.models.quantize import QuantizePass, same_weights
from qlora.models.source import Source, load_config, load_tokenizer, resolve
from qlora.models.transformers_seam import LOADING
from qlora.specs import ExportSpec, Quantization, ResolvedQuantization
from qlora_kernels import reference


@dataclass(frozen=True)
class AdaptedSource:
    """An adapter's files, where its base lies, and the tokenizer of both. `named`: the base as the user calls it."""

    files: AdapterFiles
    source: Source
    named: str
    tokenizer: PreTrainedTokenizerBase

    @property
    def dtype(self) -> str:
        """What the training computed in; "auto" means here what it would mean for a training."""
        return self.files.base.dtype or resolve_dtype("auto", CPU)

    @property
    def recipe(self) -> ResolvedQuantization:
        """How the base was quantized, with the defaults in the place of what is not known."""
        trained = self.files.base
        return Quantization(4, trained.blocksize, trained.double_quant, trained.scales).resolved()

    def written(self, spec: ExportSpec, weights: AdaptedWeights) -> Written:
        """How a model is written in the dtype of `spec`, read as training read it."""
        quantized = spec.base == "dequantized" and self.files.base.bits == 4 and self.files.base.dtype
        return Written(
            dtype=DTYPES[spec.dtype],
            read_as=DTYPES[self.dtype] if quantized else "auto",
            shard_size=spec.shard_size,
            stops=tuple(stop_ids(self.tokenizer)),
            as_stored=weights.layers.reads_stored,
        )

    def load(self, dtype: str) -> nn.Module:
        """The adapted model with the base of its training, computed in `dtype` on the CPU, in evaluation mode.

        Raises:
            UserError: see `load_source` and `put_adapter`.
        """
        return put_adapter(self.load_base(dtype), self.files).eval()

    def load_base(self, dtype: str) -> nn.Module:
        """The base of the training alone, its values rounded as they were there, in `dtype` on the CPU.

        Raises:
            UserError: see `load_source`.
        """
        recipe = self.files.base.quantization(self.source.packed)
        base: nn.Module = load_source(self.source, recipe, dtype=self.dtype, device="cpu")
        return base.to(DTYPES[dtype])

    def empty(self) -> Any:
        """The base without memory."""
        factory: Any = AutoModelForCausalLM
        with LOADING, torch.device("meta"):
            return factory.from_config(load_config(self.source), trust_remote_code=self.source.trust_remote_code)

    def parameters(self) -> int:
        """How many the base has."""
        return sum(parameter.numel() for parameter in self.empty().parameters())


def open_adapted(
    files: AdapterFiles, output: str | Path, problems: list[str], *, model: str | None, trust_remote_code: bool
) -> tuple[AdaptedSource, Path]:
    """(the adapter with its base, the absolute folder to write), before any weight of the base is read.

    Args:
        files: the adapter's.
        output: the folder to write, new or empty.
        problems: what is wrong already; said with the rest.
        model: where the base lies now, if not where the adapter says.
        trust_remote_code: run Python code that comes with the base.

    Raises:
        UserError: `problems`; the output is not empty; nobody names the base, or it is not there.
    """
    name, problems = model or files.base.model, list(problems)
    if name is None:
        rule = "the adapter does not say which base it belongs to"
        problems.append(problem("model", None, rule, "Name it with `model`"))
    folder = Path()
    try:
        folder = check_new_folder(output)
    except UserError as error:
        problems += error.problems
    if problems or name is None:
        raise UserError(problems)
    source = resolve(name, files.base.revision if model is None else None, trust_remote_code=trust_remote_code)
    own = adapter_tokenizer(files.folder, trust_remote_code=trust_remote_code)
    return AdaptedSource(files, source, name, load_tokenizer(source) if own is None else own), folder


class AdaptedWeights:
    """The linear weights of the base as they stream by, with what the adapter makes of them.

    Args:
        found: from `open_adapted`.
        base: "dequantized" (the weights that training saw) or "original" (those of the checkpoint).

    Attributes:
        layers: the pass that quantizes.
        adapted: the layers that have an adapter.
        names: of all modules of the model, once `prepare` has seen it.

    Raises:
        UserError: there are no original weights.
    """

    def __init__(self, found: AdaptedSource, base: str):
        self.files, self.spec, self.named = found.files, found.files.spec, found.named
        trained, packed = found.files.base, found.source.packed
        if packed and base == "original":
            rule = f"{found.named} is quantized itself and holds no original weights"
            raise UserError(problem("base", base, rule, "Use `base=dequantized`, or `model` with the original"))
        quantized = base == "dequantized" and (trained.bits == 4 or packed)
        self.layers = QuantizePass(found.source, trained.quantization(packed) if quantized else Quantization(16))
        self.adapted = frozenset(found.files.spec.modules)
        self.names: list[str] = []
        self._start = None if quantized else found.files.start
        self._missing = set(self.adapted)

    def prepare(self, empty: nn.Module) -> None:
        """Hold the adapter against the base before any of its tensors is read.

        Raises:
            UserError: what does not fit, in the lines of `load_adapter`.
        """
        self.layers.note(empty)
        self.names = [name for name, _ in empty.named_modules()]
        problems = self.files.misfits(empty)
        if problems:
            raise UserError(problems)

    def layer_of(self, parameter: str, value: Any) -> str | None:
        """The linear or adapted layer whose weight `parameter` is, or None. Notes for the fingerprint what is not
        quantized.
        """
        layer = parameter.removesuffix(".weight")
        if parameter == layer or layer not in self.layers.shapes:
            self.layers.fingerprint.add_other(parameter, value)
        return layer if parameter != layer and (layer in self.layers.shapes or layer in self.adapted) else None

    def frozen(self, parameter: str, layer: str, value: Any) -> FrozenWeight:
        """W [out, in] of a layer: as training had it, or of the checkpoint."""
        if layer not in self.layers.shapes:  # a head that was adapted
            return FrozenWeight(value)
        if self.layers.quantization.bits == 4:
            return FrozenWeight(self.layers.quantized(parameter, value))
        return FrozenWeight(self.layers.dense(parameter, value))

    def merged(self, layer: str, weight: FrozenWeight, dtype: torch.dtype) -> Tensor:
        """W with its adapter, if the layer has one: [out, in] in `dtype`, computed in float32."""
        if layer not in self.adapted:
            return weight.dense(dtype)
        A, B, m = self.parts(layer)
        if self._start is not None:
            weight, m = self._without_start(layer, weight, m, self._start)
        return merged_weight(weight, A, B, m, self.spec.scaling, dtype)

    def gain(self, layer: str, weight: FrozenWeight) -> Tensor | None:
        """g = m / n [out] in float32 of a DoRA layer, n_j = ||W_j + s B_j A||; None for LoRA."""
        A, B, m = self.parts(layer)
        if m is None:
            return None
        m, n = reference.clamp_magnitude(m, row_norms(weight, A, B, self.spec.scaling))
        return m / n

    def parts(self, layer: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """A, B and m of an adapted layer, in float32."""
        self._missing.discard(layer)
        return self._parts(self.files.tensors, layer)

    def _parts(self, tensors: dict[str, Tensor], layer: str) -> tuple[Tensor, Tensor, Tensor | None]:
        m = tensors[file_key(f"{layer}.magnitude")].float() if self.spec.method == "dora" else None
        return tensors[file_key(f"{layer}.lora_A")].float(), tensors[file_key(f"{layer}.lora_B")].float(), m

    def _without_start(
        self, layer: str, weight: FrozenWeight, m: Tensor | None, start: dict[str, Tensor]
    ) -> tuple[FrozenWeight, Tensor | None]:
        """The original weight without what the start will add to it, in float32, and m as it would be there."""
        A, B, m_start = self._parts(start, layer)
        dense = weight.dense(torch.float32)
        if m is not None and m_start is not None:
            m = m * dense.norm(dim=1) / m_start.where(m_start != 0, torch.ones_like(m_start))
        return FrozenWeight(torch.addmm(dense, B, A, alpha=-self.spec.scaling)), m

    def check_all(self, passed: nn.Module) -> None:
        """Once every tensor has passed.

        Raises:
            UserError: an adapted layer was not in the base, or the base has other weights than that of the training.
        """
        remedy = "Name the base it was trained on with `model`"
        if self._missing:
            rule = f"is no layer of {self.named}"
            raise UserError([problem("adapter", layer, rule, remedy) for layer in sorted(self._missing)])
        trained = self.files.base
        prints = self.layers.fingerprint.digest([parameter for parameter, _ in passed.named_parameters()])
        if trained.fingerprint is not None and not same_weights(trained, BaseInfo(fingerprint=prints)):
            rule = "its weights are not those the adapter was trained on"
            remedy = f"Give the base of the training ({trained.model}) with `model`"
            raise UserError(problem("model", self.named, rule, remedy))
