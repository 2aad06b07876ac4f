"""How the operators take DTensors: u sharded along any dimension, and with it the parameters that vary along it."""

from __future__ import annotations

import functools

import torch

from . import _ops


def prepare(u: torch.Tensor) -> None:
    """Must be called before an operator gets u, in case it is a DTensor: registers the operators' shardings."""
    if type(u) is not torch.Tensor and hasattr(u, "placements"):
        _register()


@_ops.constant_to_dynamo
def _register() -> None:
    _register_once()


@functools.cache
def _register_once() -> None:
    """Registers the operators' shardings with DTensor. Not on import, which torch.distributed.tensor would slow down."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    def register_with_mask(op):
        """register_sharding for an operator whose last argument is the mask of wanted results. DTensor then caches
        shardings by the mask, too; register_sharding alone has it heed only integer arguments."""

        def register(f):
            register_sharding(op)(f)
            propagator = DTensor._op_dispatcher.sharding_propagator
            propagator.op_to_schema_info[op].static_argnum = len(op._schema.arguments) - 1
            return f

        return register

    def wanted(placements, mask):
        return [placement if of_mask else None for placement, of_mask in zip(placements, mask)]

    def shardings(u, parameters):
        """Yields each valid (placement of u, those of the parameters, those of the parameters' gradients). The gradient
        of a parameter that does not vary along the sharded dimension is a sum over the shards."""
        yield Replicate(), [p and Replicate() for p in parameters], [p and Replicate() for p in parameters]
        for d in range(u.ndim):
            aligned = [p and d - u.ndim + p.ndim for p in parameters]
            varies = [p and k >= 0 and p.shape[k] != 1 for p, k in zip(parameters, aligned)]
            yield (
                Shard(d),
                [p and (Shard(k) if v else Replicate()) for p, k, v in zip(parameters, aligned, varies)],
                [p and (Shard(k) if v else Partial()) for p, k, v in zip(parameters, aligned, varies)],
            )

    @register_sharding(_ops.leaf_forward)
    def forward(u, *parameters):
        return [([of_u], [of_u, *of_p]) for of_u, of_p, _ in shardings(u, parameters)]

    @register_with_mask(_ops.leaf_backward)
    def backward(grad, u, *rest):
        *parameters, mask = rest
        return [
            (wanted([of_u, *of_dp], mask), [of_u, of_u, *of_p, None]) for of_u, of_p, of_dp in shardings(u, parameters)
        ]

    @register_with_mask(_ops.leaf_double_backward)
    def double_backward(v, *rest):
        directions, (_, u), parameters, mask = rest[:4], rest[4:6], rest[6:10], rest[10]
        return [
            (
                wanted([of_u, of_u, *of_dp[:3], None], mask),
                [v and of_u, *(d and place for d, place in zip(directions, of_p)), of_u, of_u, *of_p, None],
            )
            for of_u, of_p, of_dp in shardings(u, parameters)
        ]

    def glu_shardings(a, b, parameters):
        """The shardings of a, the parameters and their gradients. A packed last dimension is not sharded."""
        whole = None if b else Shard(a.ndim - 1)
        return [sharding for sharding in shardings(a, parameters) if sharding[0] != whole]

    @register_sharding(_ops.leaf_glu_forward)
    def glu_forward(a, b, *parameters):
        return [([of_a], [of_a, b and of_a, *of_p]) for of_a, of_p, _ in glu_shardings(a, b, parameters)]

    @register_with_mask(_ops.leaf_glu_backward)
    def glu_backward(grad, a, b, *rest):
        *parameters, mask = rest
        return [
            (wanted([of_a, b and of_a, *of_dp], mask), [of_a, of_a, b and of_a, *of_p, None])
            for of_a, of_p, of_dp in glu_shardings(a, b, parameters)
        ]
