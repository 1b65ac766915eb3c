"""Memory, communication, operations and ledger of scoring, for one rank. docs/scaling.md derives each formula.

Everything counts what scoring adds to training. Bytes of a collective are those of the larger of what a rank puts in and
takes out: the whole vector for an all-reduce, reduce-scatter or all-gather.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from inrun_megatron.defaults import BUCKET_SIZE, CUDA_BLOCK
from inrun_megatron.plan.costs import (
    ATTENTION_BACKWARD,
    BACKWARD,
    DOT_BYTES,
    FORWARD,
    LEDGER_ROW_BYTES,
    LEDGER_SAMPLE_BYTES,
    SUM_BYTES,
)
from inrun_megatron.plan.job import Job, count

READ, DOTS, AUDITS = "read directions", "dots", "audits"
"""Purposes of the collectives that every scored step has; the others serve a step's own directions."""

FILL, SUM, PUBLISH, MOVE = "fill directions", "sum directions", "publish directions", "move weights"


@dataclass(frozen=True)
class Memory:
    """Bytes per rank that scoring adds, on the fullest rank. directions, batch_gradient: held through the run. sums: by
    which the fp32 sums are larger than directions in bf16, from the first validation backward until they are rounded.
    parts: what this rank has of buckets that are summed or gathered, while they travel; exchange: for a moment, when
    parts and shards change places.
    rounding: the sums, while directions in bf16 are made of them. saved_weights: while weights are moved. layer: the
    largest of what one layer takes for a moment. conditioning: for a moment per optimizer tensor. activations: of
    validation microbatches that are larger than training ones."""

    directions: int
    batch_gradient: int
    sums: int
    parts: int
    exchange: int
    rounding: int
    saved_weights: int
    layer: int
    conditioning: int
    activations: int

    @property
    def held(self) -> int:
        """Through the whole run."""
        return self.directions + self.batch_gradient

    @property
    def peak(self) -> int:
        """What does not happen at the same time does not add up."""
        passes = self.saved_weights + self.activations
        filling = self.sums + max(passes, self.exchange, self.conditioning)
        return self.held + self.parts + max(filling, self.rounding, self.layer)


@dataclass(frozen=True)
class Collective:
    """`count` calls of one collective per scored step, with `bytes` in all."""

    kind: str
    group: str
    purpose: str
    count: int
    bytes: int


@dataclass(frozen=True)
class Operations:
    """Floating point operations of one scored step on all ranks; a multiply-add counts two. terms: dots of the directions
    with momentum and weights, for the momentum and decay terms."""

    training: float
    validation: float
    batch: float
    dots: float
    terms: float

    @property
    def extra(self) -> float:
        """Beside training's own."""
        return self.validation + self.batch + self.dots + self.terms


def parameters_held(job: Job) -> int:
    """Elements of a direction on one rank."""
    d = job.data_parallel
    if job.zero_stage == 3:
        return sum(ceil(parameter.numel / d) for parameter in job.parameters)
    return count(job.parameters)


def shard(job: Job) -> int:
    """Elements whose optimizer state this rank owns."""
    return count(job.parameters) if job.zero_stage == 0 else ceil(count(job.parameters) / job.data_parallel)


def flat_groups(job: Job) -> list[int]:
    """Elements of the optimizer's groups: matrices, which decay, and vectors, which do not."""
    matrices = count(tuple(parameter for parameter in job.parameters if len(parameter.shape) > 1))
    return [matrices, count(job.parameters) - matrices]


def buckets(job: Job) -> list[int]:
    """Collectives that sum, or gather, one vector over data-parallel ranks, by group (engines/buckets.py)."""
    return [ceil(numel / BUCKET_SIZE) for numel in flat_groups(job)]


def memory(job: Job) -> Memory:
    """Of the fullest rank; docs/scaling.md derives it."""
    held, k = parameters_held(job), job.targets
    largest = max(parameter.numel for parameter in job.parameters)
    # One row's weight gradient in fp32, and the sum of the rows'.
    layer = 2 * SUM_BYTES * largest
    if job.zero_stage == 3:
        # K directions of the layer put together, as they were gathered, and the next layer's on their way. What is on
        # its way while directions are filled is less: the gradients of two layers.
        layer += 3 * k * job.direction_bytes * largest
    narrow = job.direction_bytes < SUM_BYTES
    if narrow and job.parameter_bytes == 4:
        # Only the fused kernel of 16-bit training reads bf16 as it is.
        layer += k * SUM_BYTES * largest
    # At stages 1 and 2 each rank rounds its own shard; the whole sums are given up before directions take their room.
    sharded = job.zero_stage in (1, 2) and job.data_parallel > 1
    # Elsewhere moved weights come back from the optimizer's masters, without a collective.
    kept = sharded or (job.zero_stage == 0 and job.parameter_bytes == SUM_BYTES)
    extra = max(0, job.validation_rows - job.micro_batch_size)
    return Memory(
        directions=k * job.direction_bytes * held,
        batch_gradient=SUM_BYTES * held if job.cost.batch_passes else 0,
        sums=k * (SUM_BYTES - job.direction_bytes) * held,
        parts=k * SUM_BYTES * shard(job) if sharded else 0,
        exchange=2 * SUM_BYTES * shard(job) if sharded and any(n > 1 for n in buckets(job)) else 0,
        rounding=k * SUM_BYTES * held if narrow and not sharded else 0,
        saved_weights=job.parameter_bytes * count(job.parameters) if job.cost.moves and kept else 0,
        layer=layer,
        conditioning=SUM_BYTES * min(shard(job), CUDA_BLOCK),
        activations=extra * activation_bytes(job),
    )


def activation_bytes(job: Job) -> int:
    """Saved for backward by one row on one rank of the first stage: 34 s h bytes per layer in 16 bits with flash
    attention (arXiv 2205.05198, section 4.1, without its 5 a s^2 term); 10 of the 34 are not split by tensor
    parallelism unless the sequence is. A pipeline's first stage holds as many rows as there are stages."""
    t = job.tensor_parallel
    per = 34 / t if job.sequence_parallel or t == 1 else 10 + 24 / t
    if job.recompute:
        per = 2.0 / (t if job.sequence_parallel else 1)
    layers = ceil(job.model.num_layers / job.pipeline_parallel) * min(job.pipeline_parallel, job.microbatches)
    return int(job.seq_length * job.model.hidden_size * per * layers * job.parameter_bytes / 2)


def collectives(job: Job) -> list[Collective]:
    """Collectives of one scored step with its own directions that scoring itself issues; those inside its model passes are as many as training's
    own for as many microbatches."""
    if job.zero_stage == 3:
        directions = _layer_by_layer(job)
    elif job.data_parallel > 1:
        directions = _summed(job) if job.zero_stage == 0 else [*_summed_by_owner(job), *_gathered(job)]
    else:
        directions = []
    return [each for each in (*directions, *_beside_data_parallel(job), *_figures(job)) if each.count]


def _vectors(job: Job) -> int:
    """Gradients that are summed: the targets', and for a path estimator the batch's."""
    return job.targets + (1 if job.cost.batch_passes else 0)


def _layer_by_layer(job: Job) -> list[Collective]:
    """ZeRO stage 3."""
    cost, d = job.cost, job.data_parallel
    uses = [(parameter.numel, parameter.uses) for parameter in job.parameters]
    each = sum(number for _, number in uses)
    padded = sum(SUM_BYTES * d * ceil(n / d) * number for n, number in uses)
    passes = cost.validation_passes * job.validation_microbatches + cost.batch_passes * job.microbatches
    read = job.targets * padded * job.direction_bytes / SUM_BYTES
    return [
        Collective("reduce_scatter", "dp", FILL, each * passes, int(padded * passes)),
        Collective("all_gather", "dp", READ, each * job.microbatches, int(read * job.microbatches)),
    ]


def _summed(job: Job) -> list[Collective]:
    """Stage 0: every rank needs every sum."""
    size = SUM_BYTES * count(job.parameters)
    return [Collective("all_reduce", "dp", SUM, sum(buckets(job)) * _vectors(job), _vectors(job) * size)]


def _cut_groups(job: Job) -> list[int]:
    """Elements of the flat groups that travel in more than one bucket, so that parts have to change places."""
    return [n for n, calls in zip(flat_groups(job), buckets(job), strict=True) if calls > 1]


def _summed_by_owner(job: Job) -> list[Collective]:
    """Stages 1 and 2: sums go to the owners of the optimizer's shards."""
    vectors, cut, d = _vectors(job), _cut_groups(job), job.data_parallel
    size = SUM_BYTES * count(job.parameters)
    return [
        Collective("reduce_scatter", "dp", SUM, sum(buckets(job)) * vectors, vectors * size),
        Collective(
            "all_to_all", "dp", "sums to owners", len(cut) * vectors, int(vectors * SUM_BYTES * sum(cut) / d)
        ),
    ]


def _gathered(job: Job) -> list[Collective]:
    """Stages 1 and 2: directions, and moved weights, come back from the owners."""
    cut, d, gathers = _cut_groups(job), job.data_parallel, job.cost.gathers
    found = []
    for purpose, places, vectors, size in (
        (PUBLISH, "shards to buckets", job.targets, job.direction_bytes),
        (MOVE, "moved shards to buckets", gathers, job.parameter_bytes),
    ):
        bytes_cut = int(vectors * size * sum(cut) / d)
        found.append(Collective("all_to_all", "dp", places, len(cut) * vectors, bytes_cut))
        whole = vectors * size * count(job.parameters)
        found.append(Collective("all_gather", "dp", purpose, sum(buckets(job)) * vectors, whole))
    return found


def _beside_data_parallel(job: Job) -> list[Collective]:
    """Of gradients, over tensor-parallel ranks and pipeline stages."""
    cost, t, vectors = job.cost, job.tensor_parallel, _vectors(job)
    found = []
    if t > 1 and any(parameter.summed for parameter in job.parameters):
        own = sum(parameter.numel for parameter in job.parameters if parameter.summed)
        share = own / job.data_parallel if job.zero_stage else own
        calls = 2 if cost.batch_passes else 1
        size = int(vectors * SUM_BYTES * share)
        found.append(Collective("all_reduce", "tp", "parts of replicated weights", calls, size))
    if job.pipeline_parallel > 1 and not job.model.untie_embeddings_and_output_weights:
        tied = SUM_BYTES * job.vocab_size // t * job.model.hidden_size
        calls = job.targets + 1 if cost.batch_passes else job.targets if cost.moves else 1
        found.append(Collective("all_reduce", "tied", "tied embeddings", calls, vectors * tied))
    experts = sum(job.model.has_experts(layer) for layer in job.stage_layers(0))
    if t > 1 and experts:
        calls = experts * job.microbatches
        tokens = calls * job.micro_batch_size * job.seq_length
        size = tokens * (job.model.num_experts or 0)
        found.append(Collective("all_gather", "tp", "experts of tokens", calls, size))
    return found


def _figures(job: Job) -> list[Collective]:
    """Dots, and a few numbers of each target."""
    cost, d, p, k = job.cost, job.data_parallel, job.pipeline_parallel, job.targets
    found = []
    if cost.batch_passes:
        found.append(Collective("all_reduce", "world", "norm of the batch gradient", 1, DOT_BYTES))
    if job.adam and job.clips:
        calls = 1 if p == 1 or cost.moves else 1 + (d > 1)
        found.append(Collective("all_reduce", "world", "norms", calls, calls * k * DOT_BYTES))
    if d > 1 or p > 1:
        losses = cost.validation_passes + cost.loss_passes
        group = "dp" if p == 1 else "world"
        found.append(Collective("all_reduce", group, "target losses", losses, losses * k * DOT_BYTES))
    if job.tensor_parallel * p > 1:
        rows = job.microbatches * job.micro_batch_size * job.segments
        found.append(Collective("all_reduce", "mp", DOTS, 1, int(rows * k * DOT_BYTES)))
    # And the number of samples; of a pipeline the factors of every stage and their squares, too; of a path estimator how far the
    # step went along its path.
    numbers = (4 if p == 1 else 8) * k + 1 + bool(cost.batch_passes)
    found.append(Collective("all_reduce", "world", AUDITS, 1, numbers * DOT_BYTES))
    return found


def linear_weights(job: Job) -> tuple[float, float]:
    """Weights of all linear layers of the model, the output layer included, and how many of them a token meets."""
    whole = replace(job, world_size=1, tensor_parallel=1, pipeline_parallel=1, sequence_parallel=False)
    output = job.vocab_size * job.model.hidden_size
    layers = [
        parameter
        for layer in range(job.model.num_layers)
        for parameter in whole.layer_parameters(layer)
        if parameter.linear
    ]
    met = sum(parameter.numel * parameter.share for parameter in layers)
    return output + sum(parameter.numel for parameter in layers), output + met


def operations(job: Job) -> Operations:
    """Matrix products and attention. The causal half of attention counts in full, as torch's counter counts it."""
    model, s = job.model, job.seq_length
    weights, met = linear_weights(job)
    products = 2 * s * met
    heads = model.num_attention_heads * model.resolved_kv_channels
    attention = 4 * s * s * heads * model.num_layers
    forward = products + attention
    whole = (FORWARD + BACKWARD) * products + (FORWARD + ATTENTION_BACKWARD) * attention
    if job.recompute:  # the layers' forward again
        whole += forward - 2 * s * job.vocab_size * model.hidden_size
    validation_rows = job.validation_microbatches * job.validation_rows * job.data_parallel
    cost = job.cost
    return Operations(
        training=job.global_batch_size * whole,
        validation=validation_rows * (cost.validation_passes * whole + cost.loss_passes * forward),
        batch=job.global_batch_size * cost.batch_passes * whole,
        dots=2.0 * job.targets * weights * job.global_batch_size,
        terms=4.0 * job.targets * count(job.parameters) * job.tensor_parallel * job.pipeline_parallel,
    )


def ledger(job: Job) -> tuple[int, int]:
    """(rows, bytes) of `values/` at the end of the run."""
    samples = job.train_iters // job.interval * job.global_batch_size * job.segments
    rows = samples * job.targets
    return int(rows), int(rows * LEDGER_ROW_BYTES + samples * LEDGER_SAMPLE_BYTES)
