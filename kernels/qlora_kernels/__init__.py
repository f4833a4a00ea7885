"""Device code of qlora: every operator once, with a plain PyTorch reference that runs everywhere.

Nothing here imports `qlora`. See `ops.py` for the operators and `reference/` for what each of them means.
"""


class BackendError(RuntimeError):
    """What should run here cannot: QLORA_BACKEND or QLORA_CPU_ISA names it, or the native library is not of these
    sources.
    """
