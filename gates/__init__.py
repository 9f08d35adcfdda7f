"""What can be known about the Triton kernels without a GPU: how each one compiles, and how long it should take."""
