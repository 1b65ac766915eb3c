"""What the process imports from which the ranks of tests are forked (distributed.py).

The package and DeepSpeed import most of it when it is first used: `test_distributed.py` says what is missing here.
"""

import gc

import deepspeed.comm.mori
import deepspeed.module_inject.auto_ep_layer
import deepspeed.ops.op_builder.all_ops
import deepspeed.runtime.superoffload.superoffload_stage3
import deepspeed.runtime.zero.muon.muon_optimizer

import inrun_megatron.keeping.run_ledger
import inrun_megatron.shapley.in_run
import inrun_megatron.shapley.pipeline
import inrun_megatron.taps.any_module
import inrun_megatron.taps.experts
import inrun_megatron.taps.megatron
import inrun_megatron.taps.plain
import inrun_megatron.training.run
import tests.layout_runs

__all__ = ["deepspeed", "inrun_megatron", "tests"]

gc.collect()
gc.freeze()  # a rank's own collections pass over all of it
