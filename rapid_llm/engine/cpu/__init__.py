"""CPU implementation: compiled kernels, attention and matrix products, quantized layers."""
