"""See every operation that torch runs.

Private: the module `torch.utils._python_dispatch` (seen in torch 2.13), whose `TorchDispatchMode` has no public
address although torch documents it. Counting FLOPs and bytes needs it; without it the import fails by name.
"""

from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["TorchDispatchMode"]
