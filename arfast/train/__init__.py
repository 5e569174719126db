"""Training: configuration, trainer, atomic checkpoints."""

from .checkpoint import CheckpointError, latest_checkpoint, save_checkpoint, verify
from .config import TrainConfig
from .engine import NonFiniteError, StepResult, TrainState
from .evaluation import evaluate
from .signals import TrainingInterrupted
from .trainer import Trainer, TrainResult

__all__ = [
    "CheckpointError",
    "NonFiniteError",
    "StepResult",
    "TrainConfig",
    "TrainResult",
    "TrainState",
    "Trainer",
    "TrainingInterrupted",
    "evaluate",
    "latest_checkpoint",
    "save_checkpoint",
    "verify",
]
