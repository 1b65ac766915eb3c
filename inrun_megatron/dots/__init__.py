"""Pure functions on local tensors: partial dot products of rows and of their parts."""
