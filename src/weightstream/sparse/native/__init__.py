"""Products with non-zeros in C, compiled on the machine that runs them: what a package that is the same everywhere cannot have.

`compiling.py` makes a library of `products.c` with the machine's own compiler, once, and keeps it in the user's cache;
`products.py` calls it. Where there is no compiler there is no kernel `native`, and everything else is as it was.
"""
