"""What the machine can do; torch is imported when the first question is asked, not before."""

from __future__ import annotations

import os
from functools import cached_property


class Device:
    """The accelerator of this process, or its CPU."""

    @cached_property
    def kind(self) -> str:
        """`cuda` or `cpu`."""
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    @cached_property
    def name(self) -> str:
        """Marketing name of the GPU, or `CPU`."""
        import torch

        return torch.cuda.get_device_name() if self.kind == "cuda" else "CPU"

    @cached_property
    def capability(self) -> tuple[int, int]:
        """CUDA compute capability; (0, 0) on a CPU."""
        import torch

        return torch.cuda.get_device_capability() if self.kind == "cuda" else (0, 0)

    @cached_property
    def memory(self) -> int:
        """Free GPU memory in bytes, with what PyTorch keeps of an earlier run in this process; 0 on a CPU."""
        import torch

        if self.kind != "cuda":
            return 0
        kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return int(torch.cuda.mem_get_info()[0] + kept)

    @property
    def runs_triton(self) -> bool:
        """Triton kernels run on a GPU, or anywhere through Triton's own interpreter."""
        return os.environ.get("TRITON_INTERPRET") == "1" or self.kind == "cuda"

    @property
    def dtype(self) -> str:
        """Best compute dtype: bfloat16 from Ampere on, float16 on older GPUs, float32 on a CPU."""
        if self.kind == "cpu":
            return "float32"
        return "bfloat16" if self.capability >= (8, 0) else "float16"


def give_memory_back() -> None:
    """Have memory that nobody uses any more be the GPU's again."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
