"""PReLU and Leaky ReLU for PyTorch on fused Triton kernels.

One pass over memory forward; one pass backward that makes the input gradient and the slope gradient
together.
"""

from .functional import leaky_relu, prelu
from .modules import LeakyReLU, PReLU, SharedAxesPReLU
from .norms import batch_norm_prelu, instance_norm_prelu
from .optim import parameter_groups
from .override import disable, enable, enabled
from .switch import accelerate, restore
from .threshold import get_kernel_threshold, kernel_threshold, set_kernel_threshold

__all__ = [
    "LeakyReLU",
    "PReLU",
    "SharedAxesPReLU",
    "__version__",
    "accelerate",
    "batch_norm_prelu",
    "disable",
    "enable",
    "enabled",
    "get_kernel_threshold",
    "instance_norm_prelu",
    "kernel_threshold",
    "leaky_relu",
    "parameter_groups",
    "prelu",
    "restore",
    "set_kernel_threshold",
]
__version__ = "0.1.0"
