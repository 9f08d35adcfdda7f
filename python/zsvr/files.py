"""Files and folders that are complete or not there: written under a temporary name, moved into place when whole.

Whatever ends the writing (an error, a full disk, Ctrl-C) removes the temporary ones; only a process killed outright
leaves them behind, named ``.zsvr-*.partial``.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

Path = str | os.PathLike[str]

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PARTIAL = ".zsvr-{}.partial"
PRIVATE = 0o600
UMASK = os.umask(0)
os.umask(UMASK)


def check_free(path: Path, *, overwrite: bool = False) -> pathlib.Path:
    """Return ``path`` as a `pathlib.Path` if something may be written there.

    Raises:
        FileNotFoundError: the folder it should be in does not exist.
        FileExistsError: there is something already and ``overwrite`` is not set.
    """
    target = pathlib.Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent} is no folder, so {target.name} cannot be written there: create it")
    if not overwrite and (target.exists() or target.is_symlink()):
        raise FileExistsError(f"{target} exists already: choose another name, or ask to overwrite it")
    return target


def explain(error: OSError, target: pathlib.Path) -> OSError:
    """Return the error with a message that says what it means for ``target``; a full disk's says how full."""
    if error.errno not in FULL:
        return error
    try:
        free = f"{shutil.disk_usage(target.parent).free / 1e6:.0f} MB are free in {target.parent}"
    except OSError:
        free = f"{target.parent} cannot be asked for its free space"
    reason = "the file grew larger than this process may write" if error.errno == errno.EFBIG else "the disk is full"
    return OSError(error.errno, f"{target} was not written, {reason} ({free}); nothing of it was left behind")


@contextlib.contextmanager
def new_file(path: Path, *, overwrite: bool = False) -> Iterator[pathlib.Path]:
    """Give a temporary path in the same folder; the file written there becomes ``path`` if the block ends well.

    At every moment ``path`` holds what it held before or the whole new file.

    Raises:
        FileNotFoundError, FileExistsError: see `check_free`.
        IsADirectoryError: ``path`` is a folder.
        OSError: writing failed; nothing is left behind.
    """
    target = check_free(path, overwrite=overwrite)
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder: a file cannot replace it")
    partial = target.with_name(PARTIAL.format(secrets.token_hex(6)))
    try:
        yield partial
        with open(partial, "rb+") as file:  # some filesystems tell of a full disk only now
            os.fsync(file.fileno())
        if stat.S_IMODE(partial.stat().st_mode) == PRIVATE:  # safetensors makes files for their owner alone
            partial.chmod(0o666 & ~UMASK)
        check_free(target, overwrite=overwrite)
        os.replace(partial, target)
    except OSError as error:
        raise explain(error, target) from error
    except Exception as error:
        found = re.search(r"\(os error (\d+)\)", str(error))  # safetensors has an error of its own
        if found:
            raise explain(OSError(int(found[1]), str(error)), target) from error
        raise
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path, *, overwrite: bool = False, replaceable: tuple[str, ...] = ()) -> Iterator[pathlib.Path]:
    """Give a temporary folder beside ``path`` that becomes ``path`` if the block ends well.

    Args:
        path: the folder to make.
        overwrite: replace an existing one.
        replaceable: suffixes; only a folder that holds nothing but files of these is replaced, so that a mistyped
            name cannot delete anything else.

    Raises:
        FileNotFoundError, FileExistsError: see `check_free`; also where the folder holds something else.
        NotADirectoryError: ``path`` is a file.
        OSError: writing failed; nothing is left behind.
    """
    target = check_free(path, overwrite=overwrite)
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise NotADirectoryError(f"{target} is no folder: a folder cannot replace it")
    if target.is_dir():
        other = sorted(p.name for p in target.iterdir() if p.suffix.lower() not in replaceable or not p.is_file())
        if other:
            raise FileExistsError(f"{target} holds {', '.join(other[:3])} and is not replaced: choose another name")
    token = secrets.token_hex(6)
    staging = target.with_name(PARTIAL.format(token))
    before = target.with_name(PARTIAL.format(token + "-before"))
    try:
        staging.mkdir()
        yield staging
        if target.exists():
            check_free(target, overwrite=overwrite)
            os.rename(target, before)
        os.rename(staging, target)
    except OSError as error:
        raise explain(error, target) from error
    finally:
        if before.exists() and not target.exists():
            os.rename(before, target)
        shutil.rmtree(before, ignore_errors=True)
        shutil.rmtree(staging, ignore_errors=True)


def write_text(path: Path, text: str, *, overwrite: bool = False) -> None:
    """Write a text file in UTF-8 (names of files that are none: their bytes), whole or not at all."""
    with new_file(path, overwrite=overwrite) as partial:
        partial.write_text(text, encoding="utf-8", errors="surrogateescape", newline="\n")


def to_json(value: Any) -> str:
    """Return ``value`` as JSON that depends on nothing but the value: sorted keys, no NaN, a newline at the end.

    Raises:
        TypeError: something JSON does not know. ValueError: NaN or infinity.
    """
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"


def hash_json(value: Any) -> str:
    """Return the SHA-256 of `to_json`, as hex."""
    return hashlib.sha256(to_json(value).encode(errors="surrogateescape")).hexdigest()


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, or of the names and bytes of a folder's files, as hex."""
    source = pathlib.Path(path)
    if not source.is_dir():
        with open(source, "rb") as file:
            digest = hashlib.sha256()
            while block := file.read(2**20):
                digest.update(block)
            return digest.hexdigest()
    return hash_json({str(p.relative_to(source)): hash_file(p) for p in sorted(source.rglob("*")) if p.is_file()})


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors with their names, dtypes and shapes, as hex."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        x = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}\n".encode())
        digest.update(x.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
