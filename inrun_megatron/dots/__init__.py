"""Pure functions on local tensors: per-row partial dot products."""
