"""Triton kernels of otpo: transport between responses' tokens, row moves, SwiGLU, cross-entropies, AdamW on masters.

Importing this package imports no Triton.
"""
