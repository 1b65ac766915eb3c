#!/bin/bash
# Under MPI: ranks are found through mpi4py. docs/clusters.md, section MPI.
#
#   bash launch/mpi.sh FLAGS...                mpirun over the hosts below
#   salloc -N 2 --ntasks-per-node 8 bash launch/mpi.sh FLAGS...     the same through srun --mpi=pmix
set -eu
cd "$(dirname "$0")/.."

PYTHON=.venv/bin/python                    # EDIT: of the environment that has this package; the same path on every host
HOSTS=node1:8,node2:8                      # EDIT: host:ranks, ...; mpirun only
export NCCL_SOCKET_IFNAME=^lo,docker0      # EDIT: the network between the hosts
export CUDA_DEVICE_MAX_CONNECTIONS=1       # EDIT: leave out without tensor parallelism (docs/clusters.md)
EXTRA="--map-by slot"                      # EDIT: more flags for mpirun
SRUN="--mpi=pmix"                          # EDIT: what `srun --mpi=list` offers (pmi2 with an MPICH library)

if [ -n "${SLURM_JOB_ID:-}" ]; then
    # A rank that ends with an error takes the others along, on all nodes. From 22.05 on srun does not take
    # --cpus-per-task from the allocation.
    # shellcheck disable=SC2086
    exec srun $SRUN ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} --kill-on-bad-exit=1 "$PYTHON" -u launch/pretrain.py "$@"
fi
ranks=0
for host in ${HOSTS//,/ }; do ranks=$((ranks + ${host#*:})); done
forward=""
for name in PATH OMP_NUM_THREADS DS_ACCELERATOR TORCH_EXTENSIONS_DIR PYTHONPATH CUDA_DEVICE_MAX_CONNECTIONS $(compgen -e | grep -E '^(NCCL|GLOO|TORCH|HF)_' || true); do
    if [ -n "${!name:-}" ]; then forward="$forward -x $name"; fi
done
# shellcheck disable=SC2086
exec mpirun --host "$HOSTS" -np "$ranks" $EXTRA $forward "$PYTHON" -u launch/pretrain.py "$@"
