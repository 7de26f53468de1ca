"""Names of torch that carry no promise of stability, gathered here so that an upgrade breaks in one file."""

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.backends import mha
from torch.nn.attention.bias import CausalBias
from torch.overrides import _get_current_function_mode_stack as function_modes
from torch.overrides import _pop_mode as pop_mode
from torch.overrides import _push_mode as push_mode
from torch.utils._device import DeviceContext

__all__ = [
    "PLAIN_TYPES", "TORCH_SDPA", "causal_bias_dispatch", "destroy_library", "forward_mode_is_on", "function_modes",
    "has_kernel", "only_device_modes", "pop_mode", "push_mode", "set_fastpath_flag",
]

TORCH_SDPA = torch._C._nn.scaled_dot_product_attention
# plain tensors, and the types that stand for them while a program is traced or exported
PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)


def forward_mode_is_on():
    """Return whether a forward-mode derivative is being taken."""
    return forward_ad._current_level >= 0


def only_device_modes():
    """Return whether every active function mode is torch.device or torch.set_default_device; they do not affect attention."""
    if not torch._C._is_torch_function_mode_enabled():
        return True
    return all(type(mode) is DeviceContext for mode in function_modes())


def causal_bias_dispatch(*args, **options):
    """Call torch's own attention with a CausalBias; it calls scaled_dot_product_attention again without one."""
    return CausalBias._dispatch(*args, **options)


def set_fastpath_flag(patched):
    """Store the flag of multi-head attention's C++ fast path as an int while patched, as a bool otherwise.

    Dynamo does not trace into nn.MultiheadAttention, but guards on this flag. Changing its type and not its value makes
    compiled code compile again.
    """
    mha._is_fastpath_enabled = (int if patched else bool)(mha._is_fastpath_enabled)


def has_kernel(name, key):
    """Return whether the dispatcher has a kernel of operator aten::name for a dispatch key."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key)


def destroy_library(library):
    """Unregister every kernel of a torch.library.Library."""
    library._destroy()
