"""One test of whether an error says that memory ran out, of a GPU or of the machine."""

import torch

SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "_ALLOC_FAILED")


def ran_out_of_memory(error: BaseException) -> bool:
    """Return whether memory did not suffice: as torch, CUDA's libraries, numpy and Python say it.

    accelerate's `should_reduce_batch_size` lacks cuBLAS, numpy, and torch on other systems.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)
