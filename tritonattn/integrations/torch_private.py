"""Private names of torch that the patch needs, gathered so that an upgrade of torch breaks it in one file."""

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.backends import mha
from torch.nn.attention.bias import CausalBias
from torch.overrides import _get_current_function_mode_stack as function_modes
from torch.overrides import _pop_mode, _push_mode
from torch.utils._device import DeviceContext

TORCH_SDPA = torch._C._nn.scaled_dot_product_attention
# torch's own attention with a CausalBias; it calls scaled_dot_product_attention again without one
CAUSAL_BIAS_SDPA = CausalBias._dispatch
# plain tensors, and the types that stand for them while a program is traced or exported
PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)


def ragged_dimension(x):
    """Return the dimension of a nested tensor of layout torch.jagged in which its sequences differ; None for other tensors."""
    return getattr(x, "_ragged_idx", None) if x.is_nested and x.layout == torch.jagged else None


def known_lengths(x):
    """Return the least and the largest length of a nested tensor of layout torch.jagged, None where it does not know them."""
    return x._maybe_min_seqlen, x._maybe_max_seqlen


def forward_mode_is_on():
    """Return whether a forward-mode derivative is being taken."""
    return forward_ad._current_level >= 0


def only_device_modes():
    """Return whether every active function mode is torch.device or torch.set_default_device; they do not affect attention."""
    if not torch._C._is_torch_function_mode_enabled():
        return True
    return all(type(mode) is DeviceContext for mode in function_modes())


def restack_modes(count, modes):
    """Replace the `count` active function modes by these."""
    for _ in range(count):
        _pop_mode()
    for mode in modes:
        _push_mode(mode)


def set_fastpath_flag(patched):
    """Store the flag of multi-head attention's C++ fast path as an int while patched, as a bool otherwise.

    Dynamo does not trace into nn.MultiheadAttention, but guards on this flag. Changing its type and not its value makes
    compiled code compile again.
    """
    mha._is_fastpath_enabled = (int if patched else bool)(mha._is_fastpath_enabled)
