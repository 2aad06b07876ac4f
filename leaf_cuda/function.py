"""LEAF as a torch.autograd.Function, by which the fused kernels work inside torch.func."""

import torch

from . import _ops, batching, sharding


def is_in_forward_ad() -> bool:
    """Whether this call is inside torch.func.jvp or forward_ad.dual_level. There the operators must be used: a
    Function's own jvp is wrong inside a second one."""
    return torch.autograd.forward_ad._current_level >= 0


def needs_autograd_function() -> bool:
    """Whether this call is inside torch.func transforms that all take a torch.autograd.Function. functionalize takes
    none, forward mode needs the operators, and Dynamo makes wrong gradients of a Function inside a transform."""
    if not torch._C._are_functorch_transforms_active() or is_in_forward_ad() or torch.compiler.is_compiling():
        return False
    functionalize = torch._C._functorch.TransformType.Functionalize
    return all(level.key() != functionalize for level in torch._C._functorch.get_interpreter_stack())


class _LeafBackward(torch.autograd.Function):
    """(grad, u, p1, p2, p3, p4, mask) → (du, dp1, dp2, dp3, dp4), None where the mask is False or p2 or p4 None."""

    @staticmethod
    def forward(grad, u, p1, p2, p3, p4, mask):
        return _ops.leaf_backward(grad, u, p1, p2, p3, p4, mask)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:6])

    @staticmethod
    def backward(ctx, *v):
        gradients = _ops.leaf_double_backward(*v, *ctx.saved_tensors, ctx.needs_input_grad[:6])
        return *gradients, None

    @staticmethod
    def vmap(*arguments):
        return batching.backward_rule(_LeafBackward.apply)(*arguments)


class LeafFunction(torch.autograd.Function):
    """``LeafFunction.apply(u, p1, p2, p3, p4)``: what :func:`leaf_cuda.leaf` computes; p2 and p4 may be None.

    Saves only u and the parameters, and the backward kernel computes only the gradients that are needed. It has no
    forward-mode derivative (``torch.func.jvp``), unlike :func:`leaf_cuda.leaf`. In a transform of ``torch.func`` inside
    ``torch.compile`` it raises, because Dynamo makes wrong gradients of a Function there.
    """

    @staticmethod
    def forward(u, p1, p2, p3, p4):
        if torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            raise NotImplementedError(
                "LeafFunction: torch.compile makes wrong gradients of a torch.autograd.Function inside a transform of "
                "torch.func; call leaf_cuda.leaf"
            )
        sharding.prepare(u)
        return _ops.leaf_forward(u, p1, p2, p3, p4)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        backward = _ops.leaf_backward if is_in_forward_ad() else _LeafBackward.apply
        return backward(grad, *ctx.saved_tensors, ctx.needs_input_grad)

    @staticmethod
    def vmap(*arguments):
        return batching.forward_rule(LeafFunction.apply)(*arguments)
