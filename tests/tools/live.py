"""Counts the bytes of tensors that are alive: of fake ones too, and as FSDP resizes them."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """live: bytes of the storages that are there now; peak: the most there were.

    given: tensors that are there before.
    """

    def __init__(self, given=()):
        super().__init__()
        self.sizes, self.live, self.peak = {}, 0, 0
        self.given = list(given)

    @classmethod
    def is_infra_mode(cls):
        return True  # or torch.compile would run nothing compiled while it watches

    def __enter__(self):
        self.resize = resize = torch.UntypedStorage.resize_

        def watched(storage, size):
            done = resize(storage, size)
            self._see(storage)
            return done

        torch.UntypedStorage.resize_ = watched
        for tensor in self.given:
            self._see(tensor.untyped_storage())
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_ = self.resize
        return super().__exit__(*error)

    def _see(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.sizes:
            weakref.finalize(storage, self._gone, key)
        self.live += size - self.sizes.get(key, 0)
        self.sizes[key] = size
        self.peak = max(self.peak, self.live)

    def _gone(self, key):
        self.live -= self.sizes.pop(key, 0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._see(getattr(tensor, "_local_tensor", tensor).untyped_storage())
        return out
