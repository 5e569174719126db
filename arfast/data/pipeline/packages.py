"""Packages of the extra `data`, imported when a stage first needs them."""

import importlib
from types import ModuleType


def require(name: str, purpose: str) -> ModuleType:
    """The module ``name``; ImportError says what it is for and how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        text = f"prepare: {purpose} must find the package {package} (pip install 'arfast[data]'), got: {error}"
        raise ImportError(text) from None
