"""Trainless video denoising with the package's two attention operators; see `zsvr_kernels.demo.__main__`."""
