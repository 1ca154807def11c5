"""A CPU: compiled kernels for a few tokens and for attention, and what PyTorch does fast."""
