"""Training on several ranks by torch.distributed, gloo on CPUs, NCCL on GPUs: parameters and batches spread over the
ranks (FSDP2), and models that are split by tensors, experts or context."""

from .data_parallel import DataParallel
from .launch import Launch, process_group
from .mesh import ParallelConfig, init_mesh
from .parallel_model import full_state_dict, gradient_norm, load_full_state_dict, parallelize, reduce_gradients

__all__ = [
    "DataParallel",
    "Launch",
    "ParallelConfig",
    "full_state_dict",
    "gradient_norm",
    "init_mesh",
    "load_full_state_dict",
    "parallelize",
    "process_group",
    "reduce_gradients",
]
