"""When DoRA's n is computed, and by whom: one rule, in one object a layer.

    n [out], n_j = ||W_j + s B_j A||     a function of A, B and the base weight W alone (arXiv:2402.09353, section 4.3)

The rule: n is valid for a `version` of A, B and W. Whoever needs it and finds none for the current version computes it
and puts it here. That is, in training: on a GPU one operator for all layers of the model, before its forward pass
(`attach.refresh_row_norms`); on a CPU with AMX the product that decodes W anyway, from ||W_j||, which is kept here too;
elsewhere the layer. So n is computed once per optimizer step, not per micro-batch nor in the recomputation of a
checkpointed layer. The alternative, to compute n in every forward pass, costs DoRA another product.

A version counts any optimizer's step (the fused AdamW does not bump `Tensor._version`), in-place writes that torch
sees, and replaced tensors. Writes that torch cannot see (numpy, ctypes, through `.data`) need
`attach.forget_row_norms`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

Version = tuple[int, ...]

_optimizer_steps: list[int] = []  # one number: steps of any optimizer in this process, since the first adapter


def count_optimizer_steps() -> None:
    """Begin to count, at the first call: adapters are about to be attached."""
    if not _optimizer_steps:
        _optimizer_steps.append(0)
        register_optimizer_step_post_hook(_count)


def _count(optimizer, args, kwargs) -> None:
    _optimizer_steps[0] += 1


def version_of(A: Tensor, B: Tensor, W: Tensor) -> Version:
    """What n is computed from, as numbers: the last two are those of W."""
    steps = _optimizer_steps[0] if _optimizer_steps else 0
    return (steps, A._version, A.data_ptr(), B._version, B.data_ptr(), W._version, W.data_ptr())


@dataclass(slots=True)
class RowNormCache:
    """n and ||W_j|| of one layer, each with the version that it was computed from."""

    version: Version | None = None
    n: Tensor | None = None
    base_version: Version | None = None
    base: Tensor | None = None

    def get(self, version: Version) -> Tensor | None:
        """n [out] if it is that of `version`."""
        return self.n if version == self.version else None

    def put(self, version: Version, n: Tensor) -> Tensor:
        self.version, self.n = version, n
        return n

    def get_base(self, version: Version) -> Tensor | None:
        """||W_j|| [out] if it is that of the W of `version`."""
        return self.base if self.base_version == version[-2:] else None

    def put_base(self, version: Version, norms: Tensor) -> Tensor:
        self.base_version, self.base = version[-2:], norms
        return norms
