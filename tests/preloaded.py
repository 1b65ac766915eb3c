"""What the process imports from which the ranks of tests are forked (distributed.py)."""

import gc

import inrun_megatron.models.gpt
import inrun_megatron.models.pipeline
import inrun_megatron.training.main
import tests.layout_runs

__all__ = ["inrun_megatron", "tests"]

gc.collect()
gc.freeze()  # a rank's own collections pass over all of it
