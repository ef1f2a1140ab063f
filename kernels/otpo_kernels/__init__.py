"""Triton kernels of otpo: the transport between two responses' tokens. Importing this package imports no Triton."""
