"""A model among several processes: copied or sharded. Gradients are summed, not averaged: every process divides its
loss by the number of boxes of the whole step.

| strategy | a process holds | for |
|---|---|---|
| ddp | everything | up to some hundred million parameters: nothing is gathered, gradients travel during backward |
| fsdp | its share of every layer | large models: layers are gathered when they compute, in float32 |
| hsdp | its share among the processes of its machine | large models on several machines |
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from samdetr.engine.distributed.world import World, device_limit

if TYPE_CHECKING:
    from samdetr.models import Detector
    from samdetr.recipe import ParallelSection


def distribute(model: Detector, section: ParallelSection, world: World, device: torch.device) -> nn.Module:
    """Return the module to call for a forward pass of ``model``, which is on its device with its weights loaded.

    With sharding the model's parameters become DTensors: build the optimizer afterwards.
    """
    return model if world.size == 1 else wrap(model, section, world, device)


def wrap(model: Detector, section: ParallelSection, world: World, device: torch.device) -> nn.Module:
    """Do as `distribute`, whatever the number of processes; they must be in a process group."""
    if section.strategy == "ddp":
        parallel_model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        parallel_model.broadcast_buffers = any(isinstance(part, nn.BatchNorm2d) for part in model.modules())
        parallel_model.register_comm_hook(None, _sum_gradients)
        return parallel_model
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # fully_shard takes no channels-last filters
    mesh = _mesh(section, world, device)
    for part in [model.backbone, *model.layers, model]:
        sharded = fully_shard(part, mesh=mesh, reshard_after_forward=section.reshard)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it sums
    return model


def no_grad_sync(model: nn.Module, *, keep: bool) -> AbstractContextManager[object]:
    """Let a micro-batch's gradients stay in this process for now, with ``keep``, within the context.

    The context is that of its forward and backward pass.
    """
    if isinstance(model, DistributedDataParallel):
        return model.no_sync() if keep else nullcontext()
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(not keep)
    return nullcontext()


def reshard(model: nn.Module) -> None:
    """Forget gathered layers, after their shares were changed."""
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather the shards of all processes; each of them must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shard(tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(value: Tensor, example: Tensor) -> Tensor:
    """Shard ``value``, which every process has whole, as ``example`` is."""
    if not isinstance(example, DTensor):
        return value
    return distribute_tensor(value.to(example.device), example.device_mesh, example.placements)


def _mesh(section: ParallelSection, world: World, device: torch.device) -> DeviceMesh:
    if section.strategy == "fsdp":
        return init_device_mesh(device.type, (world.size,), mesh_dim_names=("process",))
    ranks, limit = torch.arange(world.size).view(-1, world.local_size), device_limit(section, device)
    # a mesh that makes its groups itself gives them torch's own limit
    groups = [dist.new_subgroups_by_enumeration(part.tolist(), timeout=limit)[0] for part in (ranks.T, ranks)]
    names = ("machine", "process")
    return DeviceMesh.from_group(groups, device.type, ranks, mesh_dim_names=names)  # type: ignore[arg-type]


def _sum_gradients(state, bucket):  # type: ignore[no-untyped-def]  # DDP takes no annotation that is a string
    future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])
