"""Peers that are packages of their own and need a GPU: compared with where they are installed."""

import importlib.util
import warnings
from collections.abc import Callable

import torch


def gpu_peer(path: str, adapt: Callable[[Callable], Callable] = lambda function: function) -> Callable | None:
    """adapt(function) of a path such as "package.module:function"; None without a GPU or without the package."""
    module, _, name = path.partition(":")
    if not torch.cuda.is_available() or importlib.util.find_spec(module.partition(".")[0]) is None:
        return None
    try:
        return adapt(getattr(importlib.import_module(module), name))
    except Exception as error:  # a package may refuse this GPU, torch or Triton in any way
        warnings.warn(f"{path} is installed but left out: {error!r}", stacklevel=2)
        return None
