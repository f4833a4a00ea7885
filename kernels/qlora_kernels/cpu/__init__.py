"""Native CPU kernels. `build.py` makes the library, `native.py` finds it, checks it and calls it."""
