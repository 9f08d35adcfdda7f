"""Every kernel once, at odd sizes: the program that compute-sanitizer watches."""

from __future__ import annotations

import calls
import torch

import zsvr_kernels as zk
from zsvr_kernels import _triton


def main() -> None:
    device = torch.device("cpu" if _triton.is_interpreted else "cuda")
    dtype = torch.float16
    for name in calls.ATTENTIONS:
        for D in (40,) if device.type == "cpu" else (8, 40, 64):
            attention, inputs = calls.case(name, device, dtype, D)
            calls.step(attention, inputs, calls.weights(inputs[0])[0])
    grid = (4, 5)
    links = calls.clip(device, 3, grid)
    zk.chain_links(links, window=1, backend="triton")
    features = calls.tokens(device, dtype, (2, 20, 40), 1)[0]
    centre = torch.full((1, 20, 2), 3, dtype=torch.int32, device=device)
    search = {"grid": grid, "backend": "triton"}
    zk.correspondence_search(features[:1], features[1:], centre, radius=2, **search)
    zk.link_score(features[:1], features[1:], links.forward[0, :1], **search)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print("ran every kernel")


if __name__ == "__main__":
    main()
