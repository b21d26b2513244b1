"""See every operation that torch runs, and whether the memory it made is still held.

Private: the module `torch.utils._python_dispatch` (seen in torch 2.13), whose `TorchDispatchMode` has no public
address although torch documents it, and `torch.multiprocessing.reductions.StorageWeakRef`, which says whether a
storage is alive without keeping it so, and `torch.utils._pytree.tree_leaves`, which finds the tensors among an
operation's arguments. Counting FLOPs and bytes needs them; without them the import fails by name.
"""

from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["StorageWeakRef", "TorchDispatchMode", "tree_leaves"]
