"""zsvr: zero-shot video restoration with a pre-trained image diffusion model, on zsvr_kernels."""

from zsvr_kernels.version import __version__

__all__ = ["__version__"]
