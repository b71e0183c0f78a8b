"""A checkpoint from the hub to a folder. Decides which files; the hub's library fetches them."""

from __future__ import annotations

import errno
import glob
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

STANDARD = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
TOKENIZERS = ("tokenizer.model", "tokenizer.json")
KEPT = "call again: what is already there is not fetched twice"


def download(
    repo: str,
    dst: Path | None = None,
    include: str | Sequence[str] | None = None,
    token: str | None = None,
) -> Path:
    """Fetch what of a repository is needed to run its model; returns the checkpoint's folder.

    That is Meta's own files where the repository has them (mostly under `original/`), else its
    safetensors, JSON and tokenizer files, else its one GGUF file. Interrupted, it is called again.
    Progress goes to stderr.

    Args:
        repo: "owner/name".
        dst: where to; by default a folder of the repository's name in the current one.
        include: patterns of the files to take instead, such as "*Q4_K_M.gguf".
        token: by default HF_TOKEN, or that of `hf auth login`.

    Raises:
        ImportError: huggingface_hub is not installed.
        ValueError: `repo` is no repository's name.
        RuntimeError: no such repository, no access to it, or nothing in it that this can run.
        OSError: no connection, or no room on the disk.
    """
    try:
        import huggingface_hub as hub
    except ImportError as e:
        raise ImportError("downloading needs a package: pip install 'llama3[hf]'") from e
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo):
        raise ValueError(f"{repo!r} is not a repository's name; it looks like owner/name")
    folder = Path(dst) if dst is not None else Path(repo.split("/")[-1])
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; give another folder")
    with _plain_errors(repo, folder):
        info = hub.HfApi(token=token).model_info(repo, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        files = choose_files(sizes, include, repo)
        check_free_space(folder, {name: sizes[name] for name in files})
        hub.snapshot_download(
            repo,
            revision=info.sha,
            local_dir=folder,
            allow_patterns=[glob.escape(name) for name in files],
            token=token,
        )
    for name in files:  # files that were there before are taken as they are
        path = folder / name
        if not path.is_file() or (sizes[name] and path.stat().st_size != sizes[name]):
            raise RuntimeError(f"{path} is not as long as in {repo}; remove it and call again")
    return folder / _folder_of(files)


def choose_files(
    sizes: dict[str, int], include: str | Sequence[str] | None, repo: str
) -> list[str]:
    """Which of a repository's files {path: bytes} to fetch, sorted: never two copies of weights.

    Raises:
        RuntimeError: there is nothing to run, or nothing that matches `include`.
    """
    if include is not None:
        patterns = [include] if isinstance(include, str) else list(include)
        files = [name for name in sizes if any(fnmatch(name, p) for p in patterns)]
        if not files:
            raise RuntimeError(f"{repo} has no file like {patterns}; it has {_some(sizes)}")
        return sorted(files)
    shards: dict[str, int] = {}
    for name in sizes:
        if fnmatch(PurePosixPath(name).name, "consolidated.*.pth"):
            place = str(PurePosixPath(name).parent)
            shards[place] = shards.get(place, 0) + 1
    places = [p for p in shards if str(PurePosixPath(p) / "params.json") in sizes]
    if places:  # of several, as 405B for 8 and for 16 ranks, the one of fewest files
        place = min(places, key=lambda p: (shards[p], p))
        kept = [name for name in sizes if str(PurePosixPath(name).parent) == place]
        return sorted(name for name in kept if place != "." or _is_metas(name))
    top = [name for name in sizes if "/" not in name]
    tensors = [name for name in top if name.endswith(".safetensors")]
    # Copies under other names (consolidated.safetensors, model.fp16.safetensors) stay there.
    tensors = [name for name in tensors if STANDARD.fullmatch(name)] or tensors
    if tensors:
        return sorted([*tensors, *(n for n in top if n.endswith(".json") or n in TOKENIZERS)])
    ggufs = [name for name in sizes if name.endswith(".gguf")]
    if len(ggufs) == 1:
        return ggufs
    if ggufs:
        raise RuntimeError(
            f"{repo} has {len(ggufs)} GGUF files: {_some(ggufs)}; choose one with include"
        )
    raise RuntimeError(
        f"{repo} has no weights that this library reads (consolidated.*.pth with params.json, "
        f"*.safetensors or *.gguf); it has {_some(sizes) or 'no files'}. Choose another repository"
    )


def _is_metas(name: str) -> bool:
    return fnmatch(name, "consolidated.*.pth") or name in (
        "params.json", "tokenizer.model", "tokenizer.model.json", "checklist.chk",
    )  # fmt: skip


def _some(names: Sequence[str] | dict[str, int]) -> str:
    names = sorted(names)
    return ", ".join(names[:8]) + f" and {len(names) - 8} more" * (len(names) > 8)


def _folder_of(files: list[str]) -> str:
    """The folder within the repository that all the files are in."""
    return os.path.commonpath([str(PurePosixPath(name).parent) for name in files])


def check_free_space(folder: Path, sizes: dict[str, int]) -> None:
    """Refuse to start what the disk has no room for.

    Raises:
        OSError: the files {path: bytes} that `folder` does not hold yet are larger than its disk.
    """
    needed = 0
    for name, size in sizes.items():
        path = folder / name
        needed += 0 if path.is_file() and path.stat().st_size == size else size
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise OSError(
            f"{needed / 1e9:.1f} GB are to be downloaded and {place} has {free / 1e9:.1f} GB free; "
            "free some or choose another disk"
        )


@contextmanager
def _plain_errors(repo: str, folder: Path) -> Iterator[None]:
    """The hub's errors in plain words, each with the next step."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repo}"
    try:
        yield
    except errors.GatedRepoError as e:
        if e.response.status_code == 401:
            step = f"ask for access on {page}, then `hf auth login` or set HF_TOKEN"
        else:
            step = f"accept the licence on {page} with the account of your token; {_said(e)}"
        raise RuntimeError(f"{repo} is gated and you have no access: {step}") from e
    except errors.RepositoryNotFoundError as e:
        raise RuntimeError(
            f"there is no repository {repo}, or it is private; check the name on {page}, and if "
            "it is yours, `hf auth login` or set HF_TOKEN"
        ) from e
    except errors.HfHubHTTPError as e:
        status = e.response.status_code
        if status in (401, 403):
            step = f"check your token: `hf auth login` or HF_TOKEN, and {page}"
        else:
            step = f"wait a little and {KEPT}"
        raise RuntimeError(f"the hub refused {repo} ({status}); {step}; {_said(e)}") from e
    except errors.OfflineModeIsEnabled as e:
        raise ConnectionError("the hub is switched off; unset HF_HUB_OFFLINE") from e
    except (OSError, errors.HTTPError) as e:  # of requests or httpx, by the library's version
        if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(f"the disk of {folder} is full; free some, then {KEPT}") from e
        if isinstance(e, OSError) and e.filename is not None:
            raise OSError(f"cannot write to {folder} ({e}); choose another folder") from e
        if type(e) is OSError and e.errno is None:
            raise  # `check_free_space`, or a file that came in another length
        text = " ".join(str(e).split()) or type(e).__name__
        raise ConnectionError(
            f"no connection to the hub ({text}); check the network, then {KEPT}"
        ) from e


def _said(e: Exception) -> str:
    """The server's own words, on one line."""
    return "the hub says: " + " ".join((getattr(e, "server_message", None) or str(e)).split())
