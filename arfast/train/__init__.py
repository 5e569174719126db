"""Training: configuration, trainer, atomic checkpoints."""

from .checkpoint import CheckpointError, latest_checkpoint, save_checkpoint, verify
from .config import TrainConfig
from .engine import NonFiniteError, StepResult, TrainState
from .evaluation import evaluate
from .recheck import UnrepeatableError
from .rewind import DivergedError
from .signals import TrainingInterrupted
from .trainer import Trainer, TrainResult

__all__ = [
    "CheckpointError",
    "DivergedError",
    "NonFiniteError",
    "StepResult",
    "TrainConfig",
    "TrainResult",
    "TrainState",
    "Trainer",
    "TrainingInterrupted",
    "UnrepeatableError",
    "evaluate",
    "latest_checkpoint",
    "save_checkpoint",
    "verify",
]
