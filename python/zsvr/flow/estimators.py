"""What estimates optical flow: DIS, RAFT, files, none."""

from __future__ import annotations

import pathlib
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from zsvr.files import Path, hash_file
from zsvr.flow.flo import read_flo
from zsvr.weights import state_dict
from zsvr_kernels.demo.denoise import optical_flow

LUMA = (0.299, 0.587, 0.114)  # BT.601, as OpenCV's


class Estimator(Protocol):
    """What estimates flow: ``u [T, 3, h, w]`` in [0, 1] -> forward (frame i to i+1) and backward (i+1 to i).

    Both ``[T-1, 2, h, w]``, (dx, dy) in pixels; they may come in another size, the check then runs at that size.
    """

    name: str

    def __call__(self, u: Tensor) -> tuple[Tensor, Tensor]: ...

    def describe(self) -> dict[str, Any]:
        """Return what identifies its results: name, options, hashes of weights or files."""


def luma(u: Tensor) -> Tensor:
    """Return the BT.601 luma ``[..., H, W]`` of frames ``[..., 3, H, W]``."""
    return (u * u.new_tensor(LUMA)[:, None, None]).sum(-3)


class DIS:
    """Dense inverse search (Kroeger et al., ECCV 2016), OpenCV's medium preset, on 8-bit luma; needs no weights."""

    name = "dis"

    def describe(self) -> dict[str, Any]:
        import cv2

        return {"name": self.name, "preset": "medium", "opencv": cv2.__version__}

    def __call__(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(flow.to(u.device) for flow in optical_flow(u.float().cpu()))  # type: ignore[return-value]


class Zero:
    """No motion."""

    name = "zero"

    def describe(self) -> dict[str, Any]:
        return {"name": self.name}

    def __call__(self, u: Tensor) -> tuple[Tensor, Tensor]:
        flow = u.new_zeros((len(u) - 1, 2, *u.shape[-2:]), dtype=torch.float32)
        return flow, flow.clone()


class RAFT:
    """RAFT large (Teed and Deng, ECCV 2020) of torchvision, with weights from a local file, 12 updates.

    Args:
        weights: state dict of ``torchvision.models.optical_flow.raft_large`` (for instance
            raft_large_C_T_SKHT_V2-ff5fadd5.pth), as .pth or .safetensors.
        device: where it runs.

    Raises:
        ModuleNotFoundError: torchvision is missing or does not fit this torch.
        FileNotFoundError: there is no such file. ValueError: it is no such state dict.
    """

    name = "raft_large"

    def __init__(self, weights: Path, device: torch.device | str = "cpu") -> None:
        path = pathlib.Path(weights)
        if not path.is_file():
            raise FileNotFoundError(
                f"raft_large needs a file of weights, there is none at {path}: save torchvision's "
                "raft_large_C_T_SKHT_V2-ff5fadd5.pth there, or use the estimator 'dis'"
            )
        try:
            from torchvision.models.optical_flow import raft_large
        except (ImportError, RuntimeError) as error:  # one built for another torch fails at registering operators
            raise ModuleNotFoundError(
                f"raft_large needs a torchvision that fits torch {torch.__version__} ({error}): install it, or use "
                "the estimator 'dis'"
            ) from error
        self._hash = hash_file(path)
        network = raft_large(weights=None, progress=False)
        try:
            network.load_state_dict(state_dict(path))
        except RuntimeError as error:
            raise ValueError(f"{path} is no state dict of torchvision's raft_large: {str(error)[:300]}") from error
        self._network = network.eval().requires_grad_(False).to(device)
        self._device = torch.device(device)

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "updates": 12, "weights": self._hash}

    @torch.no_grad()
    def __call__(self, u: Tensor) -> tuple[Tensor, Tensor]:
        H, W = u.shape[-2:]
        right, below = (max(128, -(-side // 8) * 8) - side for side in (W, H))
        x = F.pad(2 * u.float().to(self._device) - 1, (0, right, 0, below), mode="replicate")
        results = []
        for first, second in ((x[:-1], x[1:]), (x[1:], x[:-1])):
            pairs = [
                self._network(first[n : n + 1], second[n : n + 1], num_flow_updates=12)[-1] for n in range(len(first))
            ]
            results.append(torch.cat(pairs)[..., :H, :W].to(u.device) if pairs else u.new_zeros(0, 2, H, W))
        return results[0], results[1]


class Given:
    """Flow from .flo files: ``forward_00000.flo`` (frame 0 to 1), .., ``backward_00000.flo`` (frame 1 to 0), ..

    The number is that of the pair's first frame, counted from the start of the video. The files may have another size
    than the frames: the check runs at theirs, and displacements are scaled.

    Args:
        folder: where they are.
        start: number of the first frame.

    Raises:
        FileNotFoundError: no such folder.
    """

    name = "given"

    def __init__(self, folder: Path, start: int = 0) -> None:
        self._folder, self._start = pathlib.Path(folder), start
        if not self._folder.is_dir():
            raise FileNotFoundError(f"there is no folder of flow files {self._folder}")

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "files": hash_file(self._folder), "start": self._start}

    def __call__(self, u: Tensor) -> tuple[Tensor, Tensor]:
        pairs = range(self._start, self._start + len(u) - 1)
        results = []
        for direction in ("forward", "backward"):
            flows = []
            for n in pairs:
                path = self._folder / f"{direction}_{n:05d}.flo"
                if not path.is_file():
                    raise FileNotFoundError(
                        f"{path} is missing: {len(u)} frames from {self._start} need forward_{pairs[0]:05d}.flo to "
                        f"backward_{pairs[-1]:05d}.flo"
                    )
                flows.append(read_flo(path))
            if len({tuple(f.shape) for f in flows}) > 1:
                raise ValueError(f"{self._folder}: {direction} flows differ in size")
            results.append(torch.stack(flows).to(u.device) if flows else u.new_zeros(0, 2, *u.shape[-2:]))
        if results[0].shape != results[1].shape:
            raise ValueError(
                f"{self._folder}: forward flows are {tuple(results[0].shape)}, backward {tuple(results[1].shape)}"
            )
        return results[0], results[1]


def estimator(name: str, *, path: Path | None = None, device: torch.device | str = "cpu", start: int = 0) -> Estimator:
    """Return an estimator by name: "dis", "zero", "raft_large" (path: weights) or "given" (path: folder of .flo).

    Args:
        start: number of the first frame, for "given".

    Raises:
        ValueError: unknown name, or no path where one is needed. Others: see the estimator.
    """
    if name in ("raft_large", "given") and path is None:
        raise ValueError(f"the estimator {name!r} needs a path: of its {'weights' if name[0] == 'r' else '.flo files'}")
    if name == "raft_large" and path is not None:
        return RAFT(path, device)
    if name == "given" and path is not None:
        return Given(path, start)
    simple: dict[str, type[DIS] | type[Zero]] = {"dis": DIS, "zero": Zero}
    if name not in simple:
        raise ValueError(f"unknown flow estimator {name!r}: expected dis, raft_large, zero or given")
    return simple[name]()
