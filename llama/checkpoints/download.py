"""Download a checkpoint from the Hugging Face hub.

Chooses the files of a repository; huggingface_hub fetches them. Imports no model.
"""

from __future__ import annotations

import errno
import glob
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from llama.common.extras import install_line
from llama.common.files import check_free_space, replacing_file
from llama.common.listing import listing

STANDARD_NAME = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")
RETRY = "call again: files that are complete are not fetched twice"


def download(
    repo: str,
    dst: Path | None = None,
    include: str | Sequence[str] | None = None,
    token: str | None = None,
) -> Path:
    """Download the files that are needed to run a model; returns the checkpoint's folder.

    These are Meta's own files if the repository has them (mostly under `original/`), else its
    safetensors, JSON and tokenizer files, else its single GGUF file. After an interruption call it
    again: it goes on where it stopped. Progress goes to stderr.

    Args:
        repo: "owner/name", or the address of its page.
        dst: the destination; None: a folder with the repository's name in the current folder.
        include: patterns of the files to download instead, such as "*Q4_K_M.gguf".
        token: None: HF_TOKEN, or the token of `hf auth login`.

    Raises:
        ImportError: huggingface_hub is not installed.
        ValueError: `repo` is not the name of a repository.
        RuntimeError: no such repository, no access to it, or no file in it that can be loaded.
        OSError: no connection, or too little space on the disk.
    """
    try:
        import huggingface_hub as hub
    except ImportError as e:
        raise ImportError(f"downloading needs a package: {install_line('hf')}") from e
    repo = repository(repo)
    folder = Path(dst) if dst is not None else Path(repo.split("/")[-1])
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; give another folder")
    with _explain_errors(repo, folder):
        info = hub.HfApi(token=token).model_info(repo, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        files = choose_files(sizes, include, repo)
        check_free_space(folder, sum(_bytes_missing(folder / name, sizes[name]) for name in files))
        hub.snapshot_download(
            repo,
            revision=info.sha,
            local_dir=folder,
            allow_patterns=[glob.escape(name) for name in files],
            token=token,
        )
    for name in files:  # the hub's library does not check files that existed before
        path = folder / name
        if not path.is_file() or (sizes[name] and path.stat().st_size != sizes[name]):
            raise RuntimeError(f"{path} has another size than in {repo}; remove it and call again")
    return folder / _common_folder(files)


def hub_name(text: str) -> str | None:
    """The repository "owner/name" that a text names, or is an address of; None: neither."""
    at = re.fullmatch(r"(hf:/+|(https?:/+)?(www\.)?(huggingface\.co|hf\.co)/)?(.*)", text)
    assert at is not None
    if not at[1]:
        return text if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text) else None
    found = re.match(r"(\w[\w.-]*/\w[\w.-]*?)(\.git)?([/?#@]|$)", at[5])
    return found[1] if found else None


def download_once(repo: str, cache: Path) -> Path:
    """The folder of a checkpoint that was downloaded into `cache` before, or is downloaded now.

    Raises:
        see `download`.
    """
    folder = cache / repository(repo)
    done = folder / ".downloaded"  # the checkpoint's folder within `folder`
    if not done.is_file():
        found = download(repo, folder)
        with replacing_file(done) as partial:
            partial.write_text(str(found.relative_to(folder)), "utf-8")
    return folder / done.read_text("utf-8")


def repository(name: str) -> str:
    """The "owner/name" of a repository, which is given so or by the address of a page of it.

    Raises:
        ValueError: it is neither.
    """
    address, mirror = urlsplit(name), urlsplit(os.environ.get("HF_ENDPOINT", "")).netloc
    path = hub_name(name) or name
    if mirror and address.netloc == mirror:
        path = "/".join(address.path.strip("/").split("/")[:2])
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path):
        raise ValueError(f"{name!r} is not the name of a repository, which looks like owner/name")
    return path


def _bytes_missing(path: Path, size: int) -> int:
    """Bytes to download of a file of `size` bytes: 0 if `path` is complete."""
    return 0 if path.is_file() and path.stat().st_size == size else size


def choose_files(
    sizes: dict[str, int], include: str | Sequence[str] | None, repo: str
) -> list[str]:
    """The files of a repository {path: bytes} to download, sorted; one copy of the weights.

    Raises:
        RuntimeError: no file can be loaded, or none matches `include`.
    """
    if include is not None:
        patterns = [include] if isinstance(include, str) else list(include)
        files = [name for name in sizes if any(fnmatch(name, p) for p in patterns)]
        if not files:
            raise RuntimeError(
                f"{repo} has no file like {patterns}; it has {listing(sorted(sizes))}"
            )
        return sorted(files)
    if files := _meta_files(sizes):
        return files
    top = [name for name in sizes if "/" not in name]
    tensors = [name for name in top if name.endswith(".safetensors")]
    # Skips copies under other names (consolidated.safetensors, model.fp16.safetensors).
    tensors = [name for name in tensors if STANDARD_NAME.fullmatch(name)] or tensors
    if tensors:
        named = [name for name in sizes if fnmatch(name, "additional_chat_templates/*.jinja")]
        others = (".json", "chat_template.jinja")
        named += [name for name in top if name.endswith(others) or name in TOKENIZER_FILES]
        return sorted([*tensors, *named])
    ggufs = [name for name in sizes if name.endswith(".gguf")]
    if len(ggufs) == 1:
        return ggufs
    if ggufs:
        raise RuntimeError(
            f"{repo} has {len(ggufs)} GGUF files: {listing(sorted(ggufs))}; choose one with include"
        )
    raise RuntimeError(
        f"{repo} has no weights that this library reads (consolidated.*.pth with params.json, "
        f"*.safetensors or *.gguf); it has {listing(sorted(sizes)) or 'no files'}. Choose another "
        "repository"
    )


def _meta_files(sizes: dict[str, int]) -> list[str]:
    """The files of a checkpoint in Meta's layout, sorted; [] if the repository has none.

    Of several checkpoints, as 405B for 8 and for 16 ranks, the one with the fewest shards.
    """
    shards: dict[str, int] = {}  # by folder
    for name in sizes:
        if fnmatch(PurePosixPath(name).name, "consolidated.*.pth"):
            folder = str(PurePosixPath(name).parent)
            shards[folder] = shards.get(folder, 0) + 1
    folders = [f for f in shards if str(PurePosixPath(f) / "params.json") in sizes]
    if not folders:
        return []
    chosen = min(folders, key=lambda f: (shards[f], f))
    files = [name for name in sizes if str(PurePosixPath(name).parent) == chosen]
    return sorted(name for name in files if chosen != "." or _is_meta_file(name))


def _is_meta_file(name: str) -> bool:
    return fnmatch(name, "consolidated.*.pth") or name in (
        "params.json", "tokenizer.model", "tokenizer.model.json", "checklist.chk",
    )  # fmt: skip


def _common_folder(files: list[str]) -> str:
    """The folder within the repository that contains all the files."""
    return os.path.commonpath([str(PurePosixPath(name).parent) for name in files])


@contextmanager
def _explain_errors(repo: str, folder: Path) -> Iterator[None]:
    """Replace the errors of the hub's library by ones that say what to do."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repo}"
    try:
        yield
    except errors.GatedRepoError as e:
        if e.response.status_code == 401:
            step = f"ask for access on {page}, then `hf auth login` or set HF_TOKEN"
        else:
            step = f"accept the licence on {page} with your token's account; {_server_message(e)}"
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
            step = f"wait a little and {RETRY}"
        raise RuntimeError(
            f"the hub refused {repo} ({status}); {step}; {_server_message(e)}"
        ) from e
    except errors.OfflineModeIsEnabled as e:
        raise ConnectionError("the hub is switched off; unset HF_HUB_OFFLINE") from e
    except (OSError, errors.HTTPError) as e:  # requests or httpx, by version
        if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(f"the disk of {folder} is full; free some, then {RETRY}") from e
        if isinstance(e, OSError) and e.filename is not None:
            raise OSError(f"cannot write to {folder} ({e}); choose another folder") from e
        if type(e) is OSError and e.errno is None:
            raise  # of `check_free_space`, or of the hub's library: a file of another size
        text = " ".join(str(e).split()) or type(e).__name__
        raise ConnectionError(
            f"no connection to the hub ({text}); check the network, then {RETRY}"
        ) from e


def _server_message(e: Exception) -> str:
    """The message of the server, on one line."""
    return "the hub says: " + " ".join((getattr(e, "server_message", None) or str(e)).split())
