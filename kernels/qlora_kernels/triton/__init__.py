"""The operators as Triton kernels, for NVIDIA cards from compute capability 8.0 on, by subject as in every backend.

    nf4, nf4_encode          codes to numbers, a matrix times one vector; quantizing
    adapter, adapter_norms   the factors of LoRA and DoRA, and their gradients; DoRA's row norms
    step                     the loss, RMSNorm, SwiGLU, the rotation
    optim                    AdamW, 8-bit moments
    common                   what they share

A subject has a function for each operator that it takes over, and none for the others: `backends` finds them by name.
Attention and the products of dense matrices stay PyTorch's. The alternative, CUDA C++, would need a compiler and a
build for each card wherever the package is installed.
"""
