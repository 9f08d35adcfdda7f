"""Flow kept in a folder: one safetensors file per clip, estimator and options, verified when read."""

from __future__ import annotations

import json
import pathlib
import warnings
from dataclasses import asdict
from typing import Any

from torch import Tensor

from zsvr.files import Path, hash_json, hash_tensors, new_file, to_json
from zsvr.flow.estimators import Estimator
from zsvr.flow.fields import EstimationOptions, Flow, estimate

FORMAT = "zsvr.Flow 1"


def identify(u: Tensor, estimator: Estimator, options: EstimationOptions) -> dict[str, Any]:
    """Return what determines a clip's flow, as values for JSON: hash of the frames, estimator, options."""
    return {"frames": hash_tensors({"u": u}), "estimator": estimator.describe(), "options": asdict(options)}


def save(path: Path, flow: Flow, identity: dict[str, Any], *, overwrite: bool = False) -> None:
    """Write a flow with what determines it as safetensors; the file appears when it is whole."""
    import safetensors.torch

    tensors = {name: x.detach().cpu().contiguous() for name, x in flow.tensors().items()}
    facts = {"format": FORMAT, "identity": identity, "sha256": hash_tensors(tensors)}
    with new_file(path, overwrite=overwrite) as partial:  # one entry of metadata: the order of several is random
        safetensors.torch.save_file(tensors, str(partial), {"facts": to_json(facts)})


def load(path: Path) -> tuple[Flow, dict[str, Any]]:
    """Return a saved flow and what determines it.

    Raises:
        FileNotFoundError: there is none. ValueError: it is another file, or its contents have changed.
    """
    import safetensors

    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"{path} is no file")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get("facts", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if facts.get("format") != FORMAT:
            raise ValueError(f"{path} holds {facts.get('format', 'no format')!r}, expected {FORMAT!r}")
        if facts["sha256"] != hash_tensors(tensors):
            raise ValueError(f"{path} is damaged: its tensors are not those that were saved")
        return Flow(**tensors), facts["identity"]
    except (safetensors.SafetensorError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no file of saved flow, or it is damaged: {error}") from error


def cached(folder: Path, u: Tensor, estimator: Estimator, options: EstimationOptions | None = None) -> Flow:
    """Return the flow of a clip from ``folder``, or estimate it and keep it there.

    A file that is damaged is estimated anew, with a warning. Arguments as in `zsvr.flow.estimate`.
    """
    options = EstimationOptions() if options is None else options
    identity = identify(u, estimator, options)
    path = pathlib.Path(folder) / f"{hash_json(identity)[:32]}.safetensors"
    if path.is_file():
        try:
            flow, found = load(path)
            if found == json.loads(to_json(identity)):
                return flow.to(u.device)
            reason = "it belongs to another clip"
        except ValueError as error:
            reason = str(error)
        warnings.warn(f"the flow in {path} is not used but estimated anew: {reason}", stacklevel=2)
    flow = estimate(u, estimator, options)
    save(path, flow, identity, overwrite=True)
    return flow
