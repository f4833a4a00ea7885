"""Device code of qlora: every operator once, with a plain PyTorch reference that runs everywhere.

Nothing here imports `qlora`. See `ops.py` for the operators and `reference.py` for what each of them means.
"""
