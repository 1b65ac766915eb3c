"""Indexed datasets, preparation, validation targets, and the way from a sample back to its documents.

What only reads (`indexed`, `identity`, `tokenizers`, `readers`) needs neither torch nor megatron-core.
"""
