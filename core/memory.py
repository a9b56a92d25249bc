"""Host memory: refuse what does not fit, give back what is no longer needed."""

from __future__ import annotations

import ctypes
import gc

from core.errors import PreconditionError


def require_memory(need_bytes: int, purpose: str) -> None:
    """Refuse work whose estimated peak does not fit the memory that is available now."""
    import psutil

    available = psutil.virtual_memory().available
    if need_bytes > available:
        raise PreconditionError(
            f"{purpose} needs about {need_bytes / 1e9:.1f} GB of memory"
            f" and {available / 1e9:.1f} GB are available",
            "the estimate comes from the size of its weights",
            "close other programs, or use a machine with more memory",
        )


def give_memory_back() -> None:
    """Free what lies in reference cycles and, after it, in the heap's free lists.

    glibc keeps freed tensors below 32 MB: 1.3 GB of SDXL's second text encoder, 6 GB of its UNet.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
