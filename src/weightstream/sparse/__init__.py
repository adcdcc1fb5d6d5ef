"""Sparsity as pure numerics: which elements of a tensor exist, how many, how that changes, and how it is written down.

It knows no store and no engine. `masks.Mask` is a piece's mask, `pieces.sparse_pieces` says which pieces have one and
of how many non-zeros at which version, `algorithms.update` changes it, `codec` turns non-zeros into dense memory and back.
"""
