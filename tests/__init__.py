"""Tests of inrun_megatron. Shared helpers: oracle, montecarlo, distributed."""
