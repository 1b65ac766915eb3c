"""The stages' parameters, and ranks: Megatron's groups are DeepSpeed's, for every (pipeline, data, tensor) size."""

from __future__ import annotations

import itertools
from datetime import timedelta

import torch

from inrun_megatron.config import Config, DataConfig, ParallelConfig, ShapleyConfig, TrainingConfig
from inrun_megatron.training.deepspeed_config import merge
from tests.distributed import Workers, run_distributed
from tests.sequences import SEQUENCE
from tests.small_models import VOCABULARY, model_config


def _parameters(rank: int, world: int, shape: str, pp: int) -> dict[str, torch.Tensor]:
    import deepspeed
    from megatron.core import parallel_state

    from inrun_megatron.models import build_gpt
    from inrun_megatron.models.pipeline import build_pipeline
    from tests.layout_engine import named_parameters
    from tests.small_models import model_config

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    parallel_state.initialize_model_parallel(world // pp, pp)
    build = build_gpt if pp == 1 else build_pipeline
    built = build(model_config(shape, num_layers=4), vocab_size=61, seq_length=16, seed=3)
    return {name: parameter.detach().clone() for name, parameter in named_parameters(built).items()}


def test_every_pipeline_size_starts_from_the_same_parameters() -> None:
    shapes = ("gpt2", "llama")
    with Workers(2) as workers:
        staged = {shape: workers.run(_parameters, shape, 2) for shape in shapes}
    with Workers(1) as workers:
        alone = {shape: workers.run(_parameters, shape, 1)[0] for shape in shapes}
    for shape, stages in staged.items():
        whole = alone[shape]
        assert set(whole) == set(stages[0]) | set(stages[1])
        shared = set(stages[0]) & set(stages[1])
        assert shared == ({"embedding.word_embeddings.weight"} if shape == "gpt2" else set())
        for stage in stages:
            for name, parameter in stage.items():
                assert torch.equal(parameter, whole[name]), name


def _places(rank: int, world: int, tp: int, pp: int) -> list[tuple[int, list[int]]]:
    import deepspeed
    import torch.distributed as dist
    from deepspeed.runtime.pipe.topology import PipelineParallelGrid
    from megatron.core import parallel_state

    from inrun_megatron.models.pipeline import matching_topology
    from inrun_megatron.parallel import Layout

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    parallel_state.initialize_model_parallel(tp, pp)
    layout, grid = Layout.current(), PipelineParallelGrid(topology=matching_topology())
    pairs = [
        (layout.tp_group, grid.get_slice_parallel_group()),
        (layout.dp_group, grid.get_data_parallel_group()),
        (layout.pp_group, grid.get_pipe_parallel_group()),
        (layout.mp_group, grid.get_model_parallel_group()),
    ]
    found = []
    for ours, theirs in pairs:
        ranks = sorted(dist.get_process_group_ranks(ours))
        assert ranks == sorted(dist.get_process_group_ranks(theirs))
        found.append(ranks)
    assert (layout.pp_rank, layout.dp_rank, layout.tp_rank) == (
        grid.get_stage_id(),
        grid.get_data_parallel_id(),
        grid.get_slice_parallel_rank(),
    )
    return [(len(ranks), ranks) for ranks in found]


def _other_order(rank: int, world: int) -> str | None:
    import deepspeed
    from megatron.core import parallel_state

    from inrun_megatron.models.pipeline import matching_topology

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    parallel_state.initialize_model_parallel(1, 2, order="tp-cp-ep-pp-dp")
    try:
        matching_topology()
    except AssertionError as error:
        return str(error)
    return None


def test_megatrons_ranks_are_deepspeeds() -> None:
    """Groups and places of both, as they are built; control: with Megatron's other order they disagree."""
    with Workers(4) as workers:
        for tp, pp in ((2, 2), (1, 2), (1, 4)):
            for places in workers.run(_places, tp, pp):
                assert [size for size, _ in places] == [tp, 4 // (tp * pp), pp, tp * pp]
        answers = workers.run(_other_order)
    # Ranks 0 and 3 stand at the same place in both orders; the others would be given other stages' microbatches.
    assert [error is not None for error in answers] == [False, True, True, False]
    assert "rank 1: DeepSpeed's" in answers[1] and "Megatron's (pipe, data, model) = (1, 0, 0)" in answers[1]


def test_both_number_ranks_alike_at_every_size() -> None:
    """The two rank orders as arithmetic, without processes: what `matching_topology` asserts cannot fail by itself."""
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
    from megatron.core.parallel_state import RankGenerator

    for pp, dp, tp in itertools.product((1, 2, 3, 4, 8), (1, 2, 3, 4), (1, 2, 4, 8)):
        megatron = RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=1, order="tp-cp-ep-dp-pp")
        deepspeed = PipeModelDataParallelTopology(num_pp=pp, num_mp=tp, num_dp=dp)
        for ours, theirs in (("tp", "model"), ("dp", "data"), ("pp", "pipe")):
            if len(megatron.get_ranks(ours)[0]) > 1:  # DeepSpeed lists no groups of one rank
                assert sorted(megatron.get_ranks(ours)) == sorted(deepspeed.get_axis_comm_lists(theirs))


def _waits(rank: int, world: int, config: Config) -> list[timedelta]:
    """Of every group that this rank is in, how long it waits."""
    from torch.distributed import distributed_c10d

    from inrun_megatron.training import distributed, engine

    distributed.initialise(config.parallel)
    config, deepspeed_config, batch = merge(config, 1)
    engine.build_trainer(config, deepspeed_config, batch, VOCABULARY)
    groups = list(distributed_c10d._world.pg_map)
    return [group._get_backend(torch.device("cpu")).options._timeout for group in groups]


def test_every_group_waits_as_long_as_the_flag_says() -> None:
    """DeepSpeed's groups too, which it makes without a timeout: under NCCL ten minutes would end the run, whatever the flag."""
    config = Config(
        model=model_config("gpt2"),
        data=DataConfig(data_path=("unused",), seq_length=SEQUENCE),
        training=TrainingConfig(micro_batch_size=2, global_batch_size=4, train_iters=1, lr=0.1),
        parallel=ParallelConfig(
            pipeline_model_parallel_size=2, zero_stage=1, distributed_timeout_minutes=12.5
        ),
        shapley=ShapleyConfig(enabled=False),
    )
    for waits in run_distributed(_waits, 2, config, initialise=False):
        assert set(waits) == {timedelta(minutes=12.5)} and len(waits) > 20
