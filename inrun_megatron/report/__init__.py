"""From the ledger to answers: aggregation, and what the commands print. Knows nothing of torch.distributed."""
