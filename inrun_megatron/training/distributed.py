"""Ranks: how many were launched, process groups, and agreeing on errors.

Started by `deepspeed` or `torchrun` (RANK, WORLD_SIZE, ... in the environment), by `mpirun` or `srun --mpi=pmix`
(discovered through mpi4py), by `srun` (from Slurm's variables), or alone.
"""

from __future__ import annotations

import math
import os
import resource
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed import distributed_c10d

from inrun_megatron.config import ParallelConfig
from inrun_megatron.errors import UserError
from inrun_megatron.parallel import wait_at_exit
from inrun_megatron.ports import free_port

_RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_MPI = (("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), ("PMI_SIZE", "PMI_RANK"))
# Of a task that srun started. SLURM_NTASKS would be there in a batch script too, where nobody started ranks.
_SLURM = ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID")

OPEN_FILES = 1 << 16
"""More than any rank needs; some libraries walk through all numbers up to the limit."""

NCCL_PATIENCE = "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC"
"""Four times so long after NCCL has lost a peer, 60 s by default, torch ends the process with SIGABRT (`Watchdog::runLoop`
in ProcessGroupNCCL.cpp, torch 2.13)."""

VERDICT_SECONDS = 30.0
"""More than the ranks need, once a heartbeat is overdue, to agree on who is lost and to leave (watchdog.py, verdict.py)."""


def launched() -> tuple[int, int]:
    """(rank, number of ranks) as the launcher promised them, before anything is initialised."""
    for size, rank in (("WORLD_SIZE", "RANK"), *_MPI, _SLURM):
        if size in os.environ:
            return int(os.environ.get(rank, "0")), int(os.environ[size])
    return 0, 1


def _under_mpi() -> bool:
    return any(name in os.environ for name in ("PMIX_RANK", *(size for size, _ in _MPI)))


def _discover_mpi(promised: int) -> None:
    """Fill the rendezvous variables from MPI; from Slurm's where srun speaks another MPI's language than mpi4py's library.

    Slurm's default MPI may be pmi2: a plain srun then sets PMI_SIZE although nobody asked for MPI, and Open MPI, which
    does not speak it, starts every task alone. mpirun in an allocation is not meant: its daemons are the step's tasks.

    DeepSpeed's own `mpi_discovery` (deepspeed/comm/comm.py) needs the `hostname` program and uses a fixed port, on
    which two runs on one machine collide.
    """
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    if world.size == 1 < promised == int(os.environ.get(_SLURM[0], "1")):
        _discover_slurm()
        return
    hosts = world.allgather(MPI.Get_processor_name())
    address = "127.0.0.1" if len(set(hosts)) == 1 else socket.gethostbyname(socket.gethostname())
    rendezvous = (os.environ.get("MASTER_ADDR", address), os.environ.get("MASTER_PORT", str(free_port())))
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = world.bcast(rendezvous, root=0)
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(world.rank), str(world.size)
    os.environ["LOCAL_RANK"] = str(hosts[: world.rank].count(hosts[world.rank]))


def _discover_slurm() -> None:
    """Fill the rendezvous variables from Slurm's, in a task that srun started."""
    environment = os.environ
    hosts = ["scontrol", "show", "hostnames", environment["SLURM_STEP_NODELIST"]]
    first = subprocess.run(hosts, capture_output=True, text=True, check=True).stdout.split()[0]
    number = 64 * int(environment["SLURM_JOB_ID"]) + int(environment["SLURM_STEP_ID"])
    environment.setdefault("MASTER_ADDR", first)
    environment.setdefault("MASTER_PORT", str(20000 + number % 10000))
    environment["RANK"], environment["WORLD_SIZE"] = environment[_SLURM[1]], environment[_SLURM[0]]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]


def _discover(promised: int) -> None:
    """Fill the rendezvous variables, unless the launcher has; `promised`: the number of ranks that it started.

    UserError where somebody has set a part of them: without LOCAL_RANK, say, no rank knows its GPU.
    """
    missing = [name for name in _RENDEZVOUS if name not in os.environ]
    if not missing:
        return
    if _under_mpi():
        _discover_mpi(promised)
    elif _SLURM[0] in os.environ:
        _discover_slurm()
    elif "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")  # any that is free: nobody else looks for it
    else:
        raise UserError(
            f"RANK is set in the environment, but not {', '.join(missing)}: start the ranks with torchrun, deepspeed, mpirun "
            f"or srun, or set what is missing for every rank (LOCAL_RANK: its number on its host, which is that of its GPU)"
        )


def _take_gpu(local_rank: int) -> None:
    seen = torch.cuda.device_count()
    if local_rank >= seen:  # DeepSpeed's too is the GPU of this number
        raise UserError(
            f"local rank {local_rank} has no GPU: it sees {seen}; start at most one rank per GPU, and let every rank of a host "
            f"see all of its GPUs (under Slurm --gpus-per-node, not --gpus-per-task)"
        )
    torch.cuda.set_device(local_rank)


def _let_the_watchdog_speak_first(config: ParallelConfig) -> None:
    """Keep torch from ending ranks whose peer is gone before they have heard which one it is (watchdog.py).

    gloo raises an error in such a rank, which waits with it for the verdict. Under NCCL nothing is raised: a thread of torch's
    ends the process, with rank 0 the store of the heartbeats, and the log would name ranks that were well.
    """
    seconds = config.heartbeat_timeout + VERDICT_SECONDS
    os.environ.setdefault(NCCL_PATIENCE, str(math.ceil(1000 * seconds / 4)))


def allow_many_files() -> None:
    """Raise this process's limit of open files as far as it may, up to OPEN_FILES.

    Rank 0 serves a connection to every rank in each of two stores (the process groups' and the watchdog's): with the usual
    limit of 1,024 a job of some 500 ranks would stand still at its start, silently.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def meet(config: ParallelConfig) -> None:
    """Start torch.distributed: from here on ranks can agree on errors. Nothing is compiled on the way.

    UserError when fewer ranks meet than were launched, when nccl is asked for without a GPU, when this rank has none, or
    when something else listens where the ranks are to meet.
    """
    _, promised = launched()
    allow_many_files()
    _discover(promised)
    try:
        _start(config)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(
            f"port {os.environ['MASTER_PORT']} of {os.environ['MASTER_ADDR']}, where the ranks are to meet, is in use: give "
            "the launcher another one (--master_port of deepspeed, --master-port of torchrun, else MASTER_PORT)"
        ) from error
    if dist.get_world_size() != promised:
        raise UserError(
            f"the launcher started {promised} ranks but {dist.get_world_size()} met: check WORLD_SIZE and the hostfile"
        )


def _start(config: ParallelConfig) -> None:
    cuda = torch.cuda.is_available()
    if _backend(config) == "nccl" and not cuda:
        raise UserError("--distributed-backend nccl needs a GPU and torch sees none: use gloo or auto")
    if cuda:
        _take_gpu(int(os.environ["LOCAL_RANK"]))
        _let_the_watchdog_speak_first(config)
        _start_deepspeed(config)
    elif not dist.is_initialized():
        # On CPUs DeepSpeed compiles an operator before it starts torch.distributed; it takes what is there.
        dist.init_process_group("gloo", timeout=timedelta(minutes=config.distributed_timeout_minutes))


def initialise(config: ParallelConfig) -> None:
    """`meet`, where that has not been done, then DeepSpeed's view of it and megatron-core's process groups."""
    if not dist.is_initialized():
        meet(config)
    _start_deepspeed(config)
    release_shared_memory()
    if torch.cuda.is_available():
        # DeepSpeed binds ranks to their GPUs, and torch then makes each group by ncclCommSplit of the world's communicator,
        # during which nothing may be on its way there: rank 0 does not wait for what it has broadcast.
        dist.barrier()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        distributed_timeout_minutes=max(1, round(config.distributed_timeout_minutes)),
        create_gloo_process_groups=False,
    )


def limit_waits(config: ParallelConfig) -> None:
    """Let every group of this rank wait for as long as --distributed-timeout-minutes says, whoever made it. Local.

    DeepSpeed makes the groups of a pipeline without a timeout (runtime/pipe/topology.py, comm/torch.py: deepspeed 0.19), and
    torch's own is ten minutes under NCCL: there a longer flag would end the process all the same, and before the watchdog
    could name the rank that all wait for. Megatron's are limited in whole minutes.
    """
    timeout = timedelta(minutes=config.distributed_timeout_minutes)
    # torch 2.14 has a public function for it and warns of the private one.
    set_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout
    for group in distributed_c10d._world.pg_map:
        set_timeout(timeout, group)


def share_cores() -> None:
    """Limit torch's threads where ranks share a host's cores, of which each would take all. Collective over the world.

    Nothing is done with a GPU, nor where OMP_NUM_THREADS or MKL_NUM_THREADS decides (torchrun sets the first to 1).
    """
    own = (socket.gethostname(), frozenset(os.sched_getaffinity(0)))
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    sharing = sum(host == own[0] and not cores.isdisjoint(own[1]) for host, cores in ranks)
    threads = max(1, len(own[1]) // sharing)
    decided = torch.cuda.is_available() or any(f"{name}_NUM_THREADS" in os.environ for name in ("OMP", "MKL"))
    if decided or threads >= torch.get_num_threads():
        return
    torch.set_num_threads(threads)
    if dist.get_rank() == 0:
        print(
            f"{sharing} ranks share {len(own[1])} cores of this host: torch threads per rank: {threads} "
            "(OMP_NUM_THREADS decides otherwise)",
            file=sys.stderr,
            flush=True,
        )


def _backend(config: ParallelConfig) -> str:
    if config.distributed_backend != "auto":
        return config.distributed_backend
    return "nccl" if torch.cuda.is_available() else "gloo"


def _start_deepspeed(config: ParallelConfig) -> None:
    import deepspeed

    timeout = timedelta(minutes=config.distributed_timeout_minutes)
    wait_at_exit()
    deepspeed.init_distributed(
        dist_backend=_backend(config), timeout=timeout, auto_mpi_discovery=False, verbose=False
    )


def release_shared_memory() -> None:
    """Take the name from DeepSpeed's shared memory for collectives on CPUs, so that it goes with the last rank, even a killed one.

    DeepSpeed (csrc/cpu/comm/shm.cpp) leaves 66 MiB per rank and run in /dev/shm, where its launcher started them. All ranks have mapped each other's once they
    are initialised; a collective over the world.
    """
    if torch.cuda.is_available() or dist.get_world_size() == 1:
        return
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    dist.barrier()
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{dist.get_rank()}"
    Path("/dev/shm", name).unlink(missing_ok=True)


def shut_down() -> None:
    """Take the process groups down."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


class Mpu:
    """megatron-core's parallel_state under the names DeepSpeed asks a model-parallel unit for.

    For engines without a pipeline: DeepSpeed's pipeline brings its own. With one stage "model parallel" is tensor parallel (deepspeed/utils/bwc.py reads either name).
    """

    get_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_tensor_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_tensor_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_tensor_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_tensor_model_parallel_src_rank = staticmethod(parallel_state.get_tensor_model_parallel_src_rank)
    get_data_parallel_rank = staticmethod(parallel_state.get_data_parallel_rank)
    get_data_parallel_world_size = staticmethod(parallel_state.get_data_parallel_world_size)
    get_data_parallel_group = staticmethod(parallel_state.get_data_parallel_group)

    @staticmethod
    def get_data_parallel_group_ranks() -> list[int]:
        """Global ranks of this rank's data-parallel group."""
        return dist.get_process_group_ranks(parallel_state.get_data_parallel_group())
