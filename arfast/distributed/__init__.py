"""Training on several ranks: tensor, expert and context parallelism over a torch.distributed DeviceMesh."""

from .mesh import ParallelConfig, init_mesh
from .parallel_model import full_state_dict, gradient_norm, load_full_state_dict, parallelize, reduce_gradients

__all__ = [
    "ParallelConfig",
    "full_state_dict",
    "gradient_norm",
    "init_mesh",
    "load_full_state_dict",
    "parallelize",
    "reduce_gradients",
]
