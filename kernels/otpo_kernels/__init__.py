"""Triton kernels of otpo: the transport between responses' tokens, row moves, and AdamW on float32 masters.

Importing this package imports no Triton.
"""
