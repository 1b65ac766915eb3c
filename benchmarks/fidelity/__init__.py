"""What the values predict, measured: `python -m benchmarks.fidelity` (docs/evidence.md)."""
