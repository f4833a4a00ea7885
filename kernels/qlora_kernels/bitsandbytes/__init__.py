"""bitsandbytes' operators as a backend, for accelerators that neither the Triton kernels nor the native CPU library
know. One module, `nf4`: it has no others that we need.
"""
