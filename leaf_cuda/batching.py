"""vmap rules: the batch becomes one more dimension of u and of batched parameters, so that it takes a single call."""

import torch
from torch import Tensor

from . import _ops


def _batch_first(t: Tensor, dim: int | None, size: int) -> Tensor:
    """t as (batch, …): its batch dimension `dim` moved to the front, or, if it has none, expanded by one of `size`."""
    return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)


def _aligned(p: Tensor | None, dim: int | None, size: int, rank: int, own: bool) -> Tensor | None:
    """A parameter reshaped to broadcast to (batch, *u.shape), where u has `rank` dimensions. If it is not batched, its
    batch dimension is 1; with `own` it is `size`, so that each sample gets a gradient of its own. It is `size` as well
    if the parameter has more dimensions than u: behind a 1, those that do not fit u might broadcast to the batch."""
    if p is None:
        return None
    p = _batch_first(p, dim, size if own or p.dim() > rank else 1)
    batch, *shape = p.shape
    while len(shape) > rank and shape[0] == 1:  # leading 1s beyond u's dimensions are allowed
        del shape[0]
    return p.reshape(batch, *(1,) * (rank - len(shape)), *shape)


def forward_rule(leaf_forward):
    """The vmap rule of `leaf_forward`, which calls `leaf_forward` once for the whole batch."""

    def rule(info, in_dims, u, *parameters):
        size = info.batch_size
        u = _batch_first(u, in_dims[0], size)
        aligned = [_aligned(p, dim, size, u.dim() - 1, own=False) for p, dim in zip(parameters, in_dims[1:])]
        return leaf_forward(u, *aligned), 0

    return rule


def _unaligned(gradients, parameters, in_dims, size):
    """Gradients of `_aligned` parameters, reshaped to (batch, *the parameter's own shape): one for each sample."""
    return [
        d if d is None else d.reshape(_batch_first(p, dim, size).shape)
        for d, p, dim in zip(gradients, parameters, in_dims)
    ]


def _with_dims(results):
    return results, tuple(None if t is None else 0 for t in results)


def backward_rule(leaf_backward):
    """The vmap rule of `leaf_backward`, which calls it once. Each sample has its own gradient of each parameter."""

    def rule(info, in_dims, grad, u, *rest):
        *parameters, mask = rest
        dims, size = in_dims[2:6], info.batch_size
        u = _batch_first(u, in_dims[1], size)
        aligned = [_aligned(p, dim, size, u.dim() - 1, own) for p, dim, own in zip(parameters, dims, mask[1:])]
        du, *dp = leaf_backward(_batch_first(grad, in_dims[0], size), u, *aligned, mask)
        return _with_dims((du, *_unaligned(dp, parameters, dims, size)))

    return rule


def double_backward_rule(leaf_double_backward):
    """The vmap rule of `leaf_double_backward`, which calls it once: as :func:`backward_rule`."""

    def rule(info, in_dims, v, *rest):
        directions, (grad, u), parameters, mask = rest[:4], rest[4:6], rest[6:10], rest[10]
        dims, size = in_dims[7:11], info.batch_size
        if v is not None:
            v = _batch_first(v, in_dims[0], size)
        grad, u = _batch_first(grad, in_dims[5], size), _batch_first(u, in_dims[6], size)

        def own(tensors, dims):
            return [_aligned(t, dim, size, u.dim() - 1, own=True) for t, dim in zip(tensors, dims)]

        results = leaf_double_backward(v, *own(directions, in_dims[1:5]), grad, u, *own(parameters, dims), mask)
        return _with_dims((*results[:2], *_unaligned(results[2:], parameters, dims, size)))

    return rule


def _gate(a: Tensor, dim: int | None, b: Tensor | None, size: int) -> Tensor:
    """a as (batch, …). Without b, its last dimension is split into halves, so that must not be the batch."""
    a = _batch_first(a, dim, size)
    if b is None and a.dim() == 1:
        raise ValueError(
            "leaf_glu: a has shape []; without b its last dimension takes an even size, of a and b side by side"
        )
    return a


def _glu_forward(info, in_dims, a, b, *parameters):
    size = info.batch_size
    a = _gate(a, in_dims[0], b, size)
    b = b if b is None else _batch_first(b, in_dims[1], size)
    aligned = [_aligned(p, dim, size, a.dim() - 1, own=False) for p, dim in zip(parameters, in_dims[2:])]
    return _ops.leaf_glu_forward(a, b, *aligned), 0


def _glu_backward(info, in_dims, grad, a, b, *rest):
    *parameters, mask = rest
    dims, size = in_dims[3:7], info.batch_size
    grad, a = _batch_first(grad, in_dims[0], size), _gate(a, in_dims[1], b, size)
    b = b if b is None else _batch_first(b, in_dims[2], size)
    aligned = [_aligned(p, dim, size, a.dim() - 1, own) for p, dim, own in zip(parameters, dims, mask[2:])]
    da, db, *dp = _ops.leaf_glu_backward(grad, a, b, *aligned, mask)
    return _with_dims((da, db, *_unaligned(dp, parameters, dims, size)))


torch.library.register_vmap("leaf_cuda::leaf_forward", forward_rule(_ops.leaf_forward))
torch.library.register_vmap("leaf_cuda::leaf_backward", backward_rule(_ops.leaf_backward))
torch.library.register_vmap("leaf_cuda::leaf_double_backward", double_backward_rule(_ops.leaf_double_backward))
torch.library.register_vmap("leaf_cuda::leaf_glu_forward", _glu_forward)
torch.library.register_vmap("leaf_cuda::leaf_glu_backward", _glu_backward)
