"""The frozen parallel layout: which groups there are and where this rank stands in them."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from ..errors import UserError


@dataclass(frozen=True)
class Layout:
    """Process groups and places; every collective of the package names one of these groups.

    Attributes:
        tp_group: tensor-parallel group (None: tensor-parallel size 1).
        dp_group: data-parallel group (None: the whole world).
        pp_group: pipeline-parallel group (None: pipeline size 1).
        mp_group: the ranks that hold one replica of the model, tensor times pipeline parallel (None: one rank).
        tp_rank, tp_size, dp_rank, dp_size, pp_rank, pp_size: place and size in each.
    """

    tp_group: dist.ProcessGroup | None
    dp_group: dist.ProcessGroup | None
    pp_group: dist.ProcessGroup | None
    mp_group: dist.ProcessGroup | None
    tp_rank: int
    tp_size: int
    dp_rank: int
    dp_size: int
    pp_rank: int
    pp_size: int

    def __post_init__(self) -> None:
        product = self.tp_size * self.dp_size * self.pp_size
        if product != dist.get_world_size():
            raise ValueError(
                f"layout tp {self.tp_size} x dp {self.dp_size} x pp {self.pp_size} = {product} ranks, "
                f"but the world has {dist.get_world_size()}"
            )

    @classmethod
    def from_megatron(cls) -> Layout:
        """Read the groups of ``megatron.core.parallel_state``.

        Raises:
            UserError: context parallelism, under which ranks share a sample's positions.
        """
        from megatron.core import parallel_state as ps

        if ps.get_context_parallel_world_size() > 1:
            raise UserError(
                f"context parallel size {ps.get_context_parallel_world_size()} is not supported while scoring: use sequence "
                f"parallelism (context_parallel_size=1), over the tensor-parallel ranks"
            )
        return cls(
            tp_group=ps.get_tensor_model_parallel_group(),
            dp_group=ps.get_data_parallel_group(),
            pp_group=ps.get_pipeline_model_parallel_group(),
            mp_group=ps.get_model_parallel_group(),
            tp_rank=ps.get_tensor_model_parallel_rank(),
            tp_size=ps.get_tensor_model_parallel_world_size(),
            dp_rank=ps.get_data_parallel_rank(),
            dp_size=ps.get_data_parallel_world_size(),
            pp_rank=ps.get_pipeline_model_parallel_rank(),
            pp_size=ps.get_pipeline_model_parallel_world_size(),
        )

    @classmethod
    def data_parallel(cls) -> Layout:
        """Every rank a data-parallel replica: a model without Megatron layers."""
        return cls(None, dist.group.WORLD, None, None, 0, 1, dist.get_rank(), dist.get_world_size(), 0, 1)

    @classmethod
    def current(cls) -> Layout:
        """Megatron's layout where it is initialised, plain data parallelism elsewhere."""
        try:
            from megatron.core import parallel_state
        except ImportError:
            return cls.data_parallel()
        return cls.from_megatron() if parallel_state.model_parallel_is_initialized() else cls.data_parallel()

    @property
    def mp_size(self) -> int:
        """Ranks of one replica of the model."""
        return self.tp_size * self.pp_size

    @property
    def writes_ledger(self) -> bool:
        """One rank of each data-parallel replica writes its samples' rows."""
        return self.tp_rank == 0 and self.pp_rank == 0
