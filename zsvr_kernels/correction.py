"""Self-correction of links: optical flow, feature similarity and the best link so far compete per token."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from zsvr_kernels import validation
from zsvr_kernels.links import Links
from zsvr_kernels.ops.correspondence_search import correspondence_search, link_score
from zsvr_kernels.options import CorrectionOptions
from zsvr_kernels.sampling import Grid, is_inside, nearest_site

TIE = 1e-5  # cosines closer than this are equal, so that rounding never decides


@dataclass(frozen=True, eq=False, repr=False)
class LinkHistory:
    """The best link so far of every token of one layer, per direction; 26 bytes for each of ``B*(T-1)*P`` pairs.

    Attributes:
        forward, backward: float32 ``[B, T-1, P, 2]``, positions as in `Links`.
        score_forward, score_backward: float32 ``[B, T-1, P]``, their cosine when they were stored.
        has_forward, has_backward: bool ``[B, T-1, P]``, where anything is stored.
    """

    forward: Tensor
    backward: Tensor
    score_forward: Tensor
    score_backward: Tensor
    has_forward: Tensor
    has_backward: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Return the fields by name."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def to(self, device: torch.device | str) -> LinkHistory:
        """Return the history on another device."""
        return replace(self, **{name: x.to(device) for name, x in self.tensors().items()})

    def __repr__(self) -> str:
        B, pairs, P = self.has_forward.shape
        share = ", ".join(f"{float(x.float().mean()):.0%}" for x in (self.has_forward, self.has_backward) if x.numel())
        return f"LinkHistory(B={B}, T={pairs + 1}, P={P}, stored={share or 'none'})"


def _correct_direction(
    f_src: Tensor,  # [N, P, C]
    f_dst: Tensor,  # [N, P, C]
    flow: Tensor,  # fp32 [N, P, 2]
    valid: Tensor,  # bool [N, P]
    memory: tuple[Tensor, Tensor, Tensor] | None,  # positions, scores, has: fp32 [N, P, 2], fp32 [N, P], bool [N, P]
    grid: Grid,
    is_search_due: bool,
    options: CorrectionOptions,
    backend: str,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:  # positions, valid, memory
    Wg = grid[1]
    usable = valid & is_inside(flow, grid)
    score = link_score(f_src, f_dst, flow, grid=grid, backend=backend)
    best, best_score = flow, score
    found: tuple[Tensor, Tensor] | None = None
    if is_search_due:
        start = flow
        if memory is not None and options.search_center == "history":
            start = torch.where(memory[2][..., None], memory[0], flow)
        site = nearest_site(start, grid)
        centre = torch.stack((site % Wg, site // Wg), -1).to(torch.int32)
        target, cosine = correspondence_search(f_src, f_dst, centre, grid=grid, radius=options.radius, backend=backend)
        found = torch.stack((target % Wg, target // Wg), -1).to(flow.dtype), cosine
        better = found[1] > best_score + options.margin + TIE
        best, best_score = torch.where(better[..., None], found[0], best), torch.where(better, found[1], best_score)
    remembered: tuple[Tensor, Tensor, Tensor] | None = None
    if memory is not None and options.history:
        again = memory[1]
        if options.history_score == "reevaluate":
            again = link_score(f_src, f_dst, memory[0], grid=grid, backend=backend)
        remembered = memory[0], again, memory[2]
        better = remembered[2] & (again > best_score + TIE)
        best, best_score = torch.where(better[..., None], memory[0], best), torch.where(better, again, best_score)
    chosen = usable
    if options.revive_threshold is not None and (found is not None or remembered is not None):
        other, other_score = flow, torch.full_like(score, -torch.inf)
        if found is not None:
            other, other_score = found
        if remembered is not None:
            better = remembered[2] & (remembered[1] > other_score + TIE)
            other = torch.where(better[..., None], remembered[0], other)
            other_score = torch.where(better, remembered[1], other_score)
        revived = ~usable & (other_score > options.revive_threshold)
        best, best_score = torch.where(revived[..., None], other, best), torch.where(revived, other_score, best_score)
        chosen = usable | revived
    positions = torch.where(chosen[..., None], best, flow)
    if memory is None:
        memory = flow, torch.full_like(score, -torch.inf), torch.zeros_like(valid)
    kept = (
        torch.where(chosen[..., None], best, memory[0]),
        torch.where(chosen, best_score, memory[1]),
        chosen | memory[2],
    )
    return positions, valid | chosen, kept


def correct_links(
    links: Links,
    features: Tensor,
    history: LinkHistory | None = None,
    *,
    k: int = 0,
    K: int = 1,
    options: CorrectionOptions | None = None,
    backend: str = "auto",
) -> tuple[Links, LinkHistory | None]:
    """Replace links by better ones: of flow, similarity search and history, the most similar wins per token.

    Every adjacent pair of frames is corrected on its own, and so is either direction. A usable flow link (valid and
    inside the grid) competes with the best site of the search window and with the remembered link; equal within 1e-5
    the flow stays, then the search. An occluded or outgoing link is left as it is, unless ``revive_threshold`` is
    set. Before progress k/K reaches ``similarity_start`` nothing happens.

    Args:
        links: those of the optical flow, for T frames on one token grid. They compete anew at every step.
        features: ``[B, T, P, C]`` floating, what the frames look like now; no gradient flows through.
        history: committed best links, from the step before; None: none yet.
        k, K: index of the sampling step, 0..K-1, and number of steps.
        options: see `CorrectionOptions`; None: the defaults.
        backend: of `correspondence_search` and `link_score`.

    Returns:
        The corrected links, and the history to commit once the step is over (None before admission, and where
        history is switched off). Calling again with the same arguments gives the same, so a recomputed forward is
        safe as long as nothing is committed in between.

    Raises:
        TypeError, ValueError: features or history that do not fit the links, k outside 0..K-1.

    Source: the self-corrected trajectories of arXiv 2407.01960; the rules are this project's.
    """
    options = CorrectionOptions() if options is None else options
    if not isinstance(links, Links):
        raise TypeError(f"links must be zsvr_kernels.Links, got {type(links).__name__}")
    B, pairs, P, _ = links.forward.shape
    validation.check_tensor("features", features, 4, "[B, T, P, C]")
    validation.check_dtype("features", features, *validation.FLOATS)
    validation.check_shape(
        "features", features, (B, pairs + 1, P, features.shape[3]), "[B, T, P, C] with B, T, P of the links"
    )
    validation.check_device("features", features, links.forward, "links")
    K = validation.check_int("K", K, 1)
    k = validation.check_int("k", k, 0)
    if k >= K:
        raise ValueError(f"k must be within 0..K-1 = 0..{K - 1}, got {k}")
    if history is not None:
        for name, x in history.tensors().items():
            shape = (B, pairs, P, 2) if name in ("forward", "backward") else (B, pairs, P)
            validation.check_shape(f"history.{name}", x, shape, "B, T-1, P of the links")
            validation.check_device(f"history.{name}", x, links.forward, "links")
    first = options.first_admitted(K)
    if not options.enabled or k < first or not (options.similarity or options.history) or not pairs:
        return links, None
    is_search_due = options.similarity and (k - first) % options.search_every == 0
    features = features.detach()
    if features.stride(3) != 1:  # a channels-first layer's tokens
        features = features.contiguous()
    source, target = (x.reshape(B * pairs, P, -1) for x in (features[:, :-1], features[:, 1:]))
    new, kept = {}, {}
    for name, f_src, f_dst in (("forward", source, target), ("backward", target, source)):
        valid = getattr(links, f"valid_{name}").flatten(0, 1)
        memory = None
        if history is not None and options.history:
            memory = tuple(getattr(history, n).flatten(0, 1) for n in (name, f"score_{name}", f"has_{name}"))
        positions, valid, stored = _correct_direction(
            f_src, f_dst, getattr(links, name).flatten(0, 1), valid, memory, links.grid, is_search_due, options, backend
        )
        new[name], new[f"valid_{name}"] = positions.unflatten(0, (B, pairs)), valid.unflatten(0, (B, pairs))
        for n, x in zip((name, f"score_{name}", f"has_{name}"), stored, strict=True):
            kept[n] = x.unflatten(0, (B, pairs))
    return replace(links, **new), LinkHistory(**kept) if options.history else None
