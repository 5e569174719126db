"""A model's forward pass through torch.compile, in one graph with the ops of this library inside, or as it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .notices import notice


class CompiledModel:
    """Calls a model, compiled; from the first failure of the compiler on, without, after saying so.

    In one graph: what the compiler cannot take, or compiles too often, is a failure and not a silent slow path.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._compiled: Any = torch.compile(model, fullgraph=True)

    @property
    def compiles(self) -> bool:
        return self._compiled is not None

    def __call__(self, **inputs: Any) -> Any:
        if self._compiled is not None:
            try:
                return self._compiled(**inputs)
            except torch._dynamo.exc.TorchDynamoException as error:
                self.give_up(error)
        return self._model(**inputs)

    def give_up(self, error: Exception) -> None:
        """Run the model as it is from now on."""
        self._compiled = None
        reason = " ".join(str(error).split())
        notice(f"Trainer: training goes on without torch.compile, which failed: {type(error).__name__}: {reason:.300}")
