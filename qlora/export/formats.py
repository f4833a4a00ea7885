"""The formats that an adapter can be exported to, and the export itself: write, hold against the adapted model, appear.

    read_adapter -> open_adapted -> FORMATS[spec.to].write(found, spec, part) -> verify -> the folder gets its name

The folder appears whole and verified, or not at all. A format is a row of FORMATS, and its name in
`specs.ExportFormat`: how it is written, how those who serve it load it, which options have a meaning for it. The
alternative, a command for each format, would verify each in its own way.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from qlora.errors import UserError, problem
from qlora.export.adapted_source import AdaptedSource, open_adapted
from qlora.export.bnb import keep_requantized, write_requantized
from qlora.export.fold import ADAPTER, keep_folded, write_folded
from qlora.export.gguf import (
    BASE,
    MODEL,
    keep_gguf,
    keep_gguf_lora,
    load_gguf,
    load_gguf_lora,
    write_gguf,
    write_gguf_lora,
    written_type,
)
from qlora.export.kept import Kept
from qlora.export.merge import keep_merged, write_merged
from qlora.export.peft import read_adapter
from qlora.export.verify import Closeness, Expected, Limit, compare, expect, texts_of, tokenizer_problems, usual_limit
from qlora.files import whole_folder, write_json
from qlora.models.device import DTYPES
from qlora.models.info import BaseInfo
from qlora.specs import MERGE_BASES, ExportSpec, VerifySpec

HF, USUAL = ExportSpec(), VerifySpec()
REPORT = "export_report.json"
NOTHING = 1e-6  # nats a token: an adapter that changes less changes nothing that anybody would notice


@dataclass(frozen=True)
class Format:
    """What can be exported to.

    Attributes:
        write: fills an empty folder.
        keeps: what of the adapted model is in it then.
        load: gives the model in a folder as those who serve it load it, on the CPU, to compute in a dtype.
        takes: the fields of ExportSpec that have a meaning here.
        exact: whether nothing but rounding is lost, with `base="dequantized"`.
        readers: the packages that read it, for the verification.
        dtype: what `dtype="auto"` is; None: that of the training.
        use: how to use the folder, in a line.
    """

    write: Callable[[AdaptedSource, ExportSpec, Path], None]
    keeps: Callable[[AdaptedSource, ExportSpec], Kept]
    load: Callable[[Path, AdaptedSource, torch.dtype], nn.Module]
    takes: frozenset[str]
    exact: bool
    readers: tuple[str, ...]
    use: str
    dtype: str | None = None


def _by_transformers(folder: Path, found: AdaptedSource, dtype: torch.dtype) -> nn.Module:
    factory: Any = AutoModelForCausalLM
    model: nn.Module = factory.from_pretrained(
        folder, dtype=dtype, device_map={"": "cpu"}, trust_remote_code=found.source.trust_remote_code
    )
    for parameter in model.parameters():
        if parameter.is_floating_point():  # beside 4-bit layers transformers leaves them in the dtype of their files
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # a 4-bit layer of bitsandbytes
            vars(module)["support_avx512bf16_for_cpu"] = False  # it would round constants to bf16; on cards it does not
            vars(module)["compute_dtype"] = dtype
            cast(Any, module).weight.quant_state.dtype = dtype
    return model


def _by_peft(folder: Path, found: AdaptedSource, dtype: torch.dtype) -> nn.Module:
    import peft

    model: nn.Module = peft.PeftModel.from_pretrained(_by_transformers(folder, found, dtype), folder / ADAPTER)
    return model


_MERGED = frozenset({"base", "dtype", "shard_size"})
FORMATS = {
    "hf": Format(
        write_merged,
        keep_merged,
        _by_transformers,
        takes=_MERGED,
        exact=True,
        readers=("transformers",),
        use="AutoModelForCausalLM.from_pretrained({folder!r})",
        dtype="bf16",
    ),
    "bnb4-lora": Format(
        write_folded,
        keep_folded,
        _by_peft,
        takes=frozenset({"dtype", "double_quant", "shard_size"}),
        exact=True,
        readers=("transformers", "bitsandbytes", "peft"),
        use="PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({folder!r}), {adapter!r})",
    ),
    "bnb4": Format(
        write_requantized,
        keep_requantized,
        _by_transformers,
        takes=_MERGED,
        exact=False,
        readers=("transformers", "bitsandbytes"),
        use="AutoModelForCausalLM.from_pretrained({folder!r})",
    ),
    "gguf": Format(
        write_gguf,
        keep_gguf,
        load_gguf,
        takes=frozenset({"base", "type"}),
        exact=True,
        readers=("gguf",),
        use="llama-server -m {folder}/model.gguf",
    ),
    "gguf-lora": Format(
        write_gguf_lora,
        keep_gguf_lora,
        load_gguf_lora,
        takes=frozenset({"type"}),
        exact=True,
        readers=("gguf",),
        use="llama-server -m {base} --lora {folder}/adapter.gguf",
    ),
}


@dataclass(frozen=True)
class Exported:
    """What an export wrote: its folder, the base it was merged into, how close it is to the adapted model (None:
    not verified), and the line that uses it.
    """

    folder: Path
    base: str
    closeness: Closeness | None
    use: str


def export_adapter(
    adapter: str | Path,
    output: str | Path,
    spec: ExportSpec = HF,
    *,
    model: str | None = None,
    trust_remote_code: bool = False,
    verify: VerifySpec | None = USUAL,
) -> Exported:
    """Write an adapter, with its base, as others serve it, and hold that against the adapted model.

    Args:
        adapter: the adapter's folder.
        output: the folder to write, new or empty.
        spec: the format and its options.
        model: where the base lies now if it has moved since the training; its weights must be the same.
        trust_remote_code: run Python code that comes with the base.
        verify: how it is verified; None: not at all.

    Raises:
        UserError: the output is not empty, or something else appears there in the meantime (the result is then beside
            it); whatever `load_adapter` refuses; the base is not the one of the training; an option has no meaning for
            the format, which does not take the adapter; the result is too far from the adapted model; the disk is full.
            Nothing is left then.
    """
    files = read_adapter(adapter)
    problems = _problems(spec, verify, files.base)
    found, folder = open_adapted(files, output, problems, model=model, trust_remote_code=trust_remote_code)
    row = FORMATS[spec.to]
    spec = dataclasses.replace(spec, dtype=(row.dtype or found.dtype) if spec.dtype == "auto" else spec.dtype)
    texts = None if verify is None else texts_of(found, verify.data)
    with whole_folder(folder, replaces=False) as part:
        written = _write(found, spec, part)
        gc.collect()  # a model just read is a circle of references, and two are coming
        expected = None
        if texts is not None:
            onto = {base: dataclasses.replace(spec, base=base) for base in written}
            expected = expect(found, texts, {base: row.keeps(found, one) for base, one in onto.items()})
        base, closeness = _closest(found, spec, written, expected)
        if expected is not None and closeness is not None and verify is not None:
            type = written_type(found, spec) if spec.to.startswith("gguf") else None
            coarse = not row.exact or spec.double_quant or type in ("Q8_0", "Q4_0")
            exact = not coarse and (base == "dequantized" or files.base.bits != 4)
            rounded = {"F16": "fp16", "BF16": "bf16"}.get(str(type), spec.dtype)
            if (spec.to == "bnb4-lora" and spec.dtype == found.dtype) or (spec.to == "gguf-lora" and type is None):
                rounded = "fp32"  # constants and adapter are float32, and the rest has the dtype it was trained with
            _refuse_far(closeness[base], usual_limit(exact, rounded, expected.dtype), verify)
            _say_effect(expected, closeness[base])
        _keep(written[base], part)
        write_json(part / REPORT, _report(found, spec, base, expected, closeness))
    base_file = folder / BASE if (folder / BASE).exists() else "BASE.gguf"
    use = row.use.format(folder=str(folder), adapter=str(folder / ADAPTER), base=base_file)
    return Exported(folder, base, None if closeness is None else closeness[base], use)


def merge(
    adapter: str | Path,
    output: str | Path,
    *,
    base: str = "dequantized",
    dtype: str = "bf16",
    model: str | None = None,
    shard_size: int = 10**9,
    trust_remote_code: bool = False,
    verify: bool = True,
) -> Path:
    """Merge an adapter folder into its base and write a model that plain transformers loads; returns the folder.

    Args:
        adapter: the adapter's folder.
        output: the folder to write, new or empty.
        base: "dequantized" (the weights that training saw), "original" (those of the checkpoint), or "best" (the one
            that comes closer to the adapted model).
        dtype: of the merged weights: bf16, fp16 or fp32.
        model: where the base lies now if it has moved since the training; its weights must be the same.
        shard_size: bytes of the largest file.
        trust_remote_code: run Python code that comes with the base.
        verify: compute with the result, and refuse one that is not the adapted model.

    Raises:
        UserError: see `export_adapter`.
    """
    spec = ExportSpec("hf", base, dtype, shard_size=shard_size)
    checked = VerifySpec() if verify else None
    return export_adapter(
        adapter, output, spec, model=model, trust_remote_code=trust_remote_code, verify=checked
    ).folder


def _problems(spec: ExportSpec, verify: VerifySpec | None, trained: BaseInfo) -> list[str]:
    """What is wrong with the options, before anything but the adapter is looked at."""
    if spec.to not in FORMATS:
        return [problem("to", spec.to, f"must be one of {', '.join(FORMATS)}", "hf is what most programs read")]
    row, problems = FORMATS[spec.to], spec.problems()
    if spec.base not in MERGE_BASES:
        rule = f"must be one of {', '.join(MERGE_BASES)}"
        problems.append(problem("base", spec.base, rule, "dequantized is what was trained"))
    if spec.dtype not in ("auto", *DTYPES):
        problems.append(problem("dtype", spec.dtype, f"must be one of {', '.join(DTYPES)}", "bf16 is the default"))
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if field.name != "to" and field.name not in row.takes and value != field.default:
            problems.append(problem(field.name, value, f"has no meaning for `to={spec.to}`", "Leave it out"))
    if trained.bits is None and spec.base == "dequantized":
        rule = "the adapter was not made here and does not say how its base was quantized"
        remedy = "Use `base=original`" if "base" in row.takes else "Use `to=hf` with `base=original`"
        problems.append(problem("base", spec.base, rule, remedy))
    elif trained.bits == 16 and spec.to == "bnb4-lora":
        rule = "the adapter was trained on 16-bit weights, which have no constants to rescale"
        problems.append(problem("to", spec.to, rule, "Use `to=hf`, or `to=bnb4`"))
    if verify is None and spec.base == "best":
        problems.append(problem("base", "best", "needs the verification, which compares both", "Leave out `verify`"))
    if verify is not None:
        problems += verify.problems()
        missing = [name for name in row.readers if importlib.util.find_spec(name) is None]
        rule = f"needs {' and '.join(missing)}, which read this format"
        remedy = f"Install with: pip install {' '.join(missing)}; or use `verify=False`"
        problems += [problem("verify", True, rule, remedy)] if missing else []
    return problems


def _write(found: AdaptedSource, spec: ExportSpec, part: Path) -> dict[str, Path]:
    """The folders that were written, by what was merged into; `part` itself where that was given."""
    row = FORMATS[spec.to]
    if spec.base != "best":
        row.write(found, spec, part)
        return {spec.base: part}
    folders = {base: part / base for base in ("dequantized", "original")}
    for base, folder in folders.items():
        folder.mkdir()
        row.write(found, dataclasses.replace(spec, base=base), folder)
    return folders


def _closest(
    found: AdaptedSource, spec: ExportSpec, written: dict[str, Path], expected: Expected | None
) -> tuple[str, dict[str, Closeness] | None]:
    """(the base with the smallest KL, how close each is); the only one, and None, where nothing is compared."""
    if expected is None:
        return next(iter(written)), None
    closeness, row, dtype = {}, FORMATS[spec.to], DTYPES[expected.dtype]

    def load(place: Path) -> nn.Module:
        return row.load(place, found, dtype)

    for base, folder in written.items():
        gguf = next((name for name in (MODEL, BASE) if (folder / name).exists()), None)
        has_tokenizer = gguf is not None or spec.to != "gguf-lora"
        problems = tokenizer_problems(found, folder, gguf) if has_tokenizer else []
        if problems:
            raise UserError(problems)
        closeness[base] = compare(expected, folder, load, base)
        _refuse_damaged(closeness[base])
        gc.collect()
    return min(closeness, key=lambda base: closeness[base].kl), closeness


def _refuse_damaged(closeness: Closeness) -> None:
    """Nothing, if the files are the model that the format keeps.

    Raises:
        UserError: they are not, with the figures.
    """
    if not closeness.is_whole:
        off = f"{100 * closeness.kept_error:.2g} % off, where rounding makes {100 * closeness.noise:.2g} %"
        rule = f"what was written computes another model than its format keeps: logits {off}"
        remedy = "Nothing was written. Write it again; if that does not help, report it, with `qlora doctor`"
        raise UserError(problem("verify", "failed", rule, remedy))


def _refuse_far(closeness: Closeness, limit: Limit, verify: VerifySpec) -> None:
    """Nothing, if the export is as close as its format should be.

    Raises:
        UserError: it is not, with the figures.
    """
    limit = limit if verify.max_kl is None else Limit(verify.max_kl)
    if not limit.holds(closeness):
        error = "" if limit.logit_error == math.inf else f" with logits {100 * limit.logit_error:g} % off at most"
        rule = f"the export is further from the adapted model than that{error}: {closeness}"
        remedy = "Nothing was written. Use another format or dtype, or give a larger `max_kl`"
        raise UserError(problem("max_kl", f"{limit.kl:g}", rule, remedy))


def _say_effect(expected: Expected, closeness: Closeness) -> None:
    """Say on stderr if the adapter does almost nothing, or no more than the export's own error."""
    if expected.effect < NOTHING:
        said = f"the adapter changes almost nothing (KL {expected.effect:.2g} from the model before the training)"
    elif closeness.kl > expected.effect / 2:
        said = (
            f"the export is as far from the adapted model (KL {closeness.kl:.2g}) as the training moved it "
            f"(KL {expected.effect:.2g})"
        )
    else:
        return
    print(f"note: {said}", file=sys.stderr, flush=True)


def _keep(chosen: Path, part: Path) -> None:
    """Make `chosen`, one of the folders in `part`, all that is in it."""
    if chosen == part:
        return
    for path in part.iterdir():
        if path != chosen:
            shutil.rmtree(path)
    for path in chosen.iterdir():
        path.rename(part / path.name)
    chosen.rmdir()


def _report(
    found: AdaptedSource, spec: ExportSpec, base: str, expected: Expected | None, closeness: dict[str, Closeness] | None
) -> dict[str, Any]:
    """What stands in export_report.json."""
    row, trained = FORMATS[spec.to], found.files.base
    verified = None if closeness is None else {name: dataclasses.asdict(value) for name, value in closeness.items()}
    return {
        "format": 1,
        "to": spec.to,
        "base": base,
        "dtype": spec.dtype,
        "double_quant": spec.double_quant,
        "type": written_type(found, spec) if spec.to.startswith("gguf") else None,
        "adapter": str(found.files.folder),
        "trained": {"model": trained.model, "bits": trained.bits, "dtype": trained.dtype},
        "readers": {name: metadata.version(name) for name in row.readers if importlib.util.find_spec(name)},
        "verified": verified and verified[base],
        "others": verified and {name: value for name, value in verified.items() if name != base},
        "computed_in": None if expected is None else expected.dtype,
        "effect_kl": None if expected is None else expected.effect,
    }
