"""Every operator in plain PyTorch, computed in float32: the specification, and the fallback on every device.

By subject, as in every backend: `nf4` (quantized weights), `adapter` (LoRA and DoRA), `step` (between the products of a
layer), `attention`, `optim`; this file collects them, so that nothing is listed twice. Kernels equal it: codes,
constants and decoded values bit for bit, sums to rounding.
"""

from qlora_kernels.reference.adapter import *
from qlora_kernels.reference.attention import *
from qlora_kernels.reference.common import *
from qlora_kernels.reference.nf4 import *
from qlora_kernels.reference.optim import *
from qlora_kernels.reference.step import *
