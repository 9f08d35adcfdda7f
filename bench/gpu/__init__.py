"""Tests and measurements on an NVIDIA GPU in one command, ``python -m bench.gpu``; see bench/gpu/__main__.py."""
