"""Memory that operations leave behind, counted by its tensors."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def _storages(tree):
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Storages(TorchDispatchMode):
    """What the operations within it made, of which `alive` bytes still are: those that a backward pass needs."""

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        views_of = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(outputs):
            if storage._cdata not in views_of:
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return outputs

    def alive(self):
        return sum(nbytes for reference, nbytes in self.made.values() if not reference.expired())
