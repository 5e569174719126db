"""Training on several ranks by torch.distributed, gloo on CPUs, NCCL on GPUs: models split by tensors, experts or
context, and what that leaves a rank spread, with the batches, over the others (FSDP2)."""

from .launch import Launch, process_group
from .mesh import ParallelConfig, init_mesh
from .parallel_model import full_state_dict, gradient_norm, load_full_state_dict, parallelize, reduce_gradients
from .strategy import Parallel

__all__ = [
    "Launch",
    "Parallel",
    "ParallelConfig",
    "full_state_dict",
    "gradient_norm",
    "init_mesh",
    "load_full_state_dict",
    "parallelize",
    "process_group",
    "reduce_gradients",
]
