"""The state dict of a model in what a training loop saved. Knows the embedding's name only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from llama.common.listing import listing

EMBEDDING = "tok_embeddings.weight"
# Where training loops keep the state dict.
WRAPPERS = ("model", "state_dict", "model_state_dict", "module")


def unwrap(content: Any) -> Any:
    """The state dict in the content of a `.pth`, without what training loops put around it.

    That is a dict with other things, such as the optimizer's state, a prefix of all names, and
    entries that lack the prefix or are not tensors.

    Raises:
        ValueError: it has several state dicts.
    """
    state = _find_state_dict(content)
    if state is None:
        return content  # the caller's checks say what is wrong
    prefixes = [name.removesuffix(EMBEDDING) for name in state if _is_embedding(state, name)]
    if len(prefixes) > 1 and "" not in prefixes:
        raise _several(prefix + EMBEDDING for prefix in prefixes)
    prefix = min(prefixes)  # "", if there is one: other names are the caller's to check
    return {
        name.removeprefix(prefix): w
        for name, w in state.items()
        if _is_weight(name, w) and name.startswith(prefix)
    }


def _find_state_dict(content: Any, depth: int = 3) -> dict[str, Any] | None:
    """The dict in nested dicts that has the embedding; usual names take precedence.

    Raises:
        ValueError: several have it, so that the model's own weights are unknown.
    """
    if not isinstance(content, dict):
        return None
    if any(_is_embedding(content, name) for name in content):
        return content
    if not depth:
        return None
    usual = [name for name in WRAPPERS if name in content]
    for names in (usual, [name for name in content if name not in WRAPPERS]):
        found = {name: _find_state_dict(content[name], depth - 1) for name in names}
        states = {name: state for name, state in found.items() if state is not None}
        if len(states) > 1:
            raise _several(states)
        if states:
            return states.popitem()[1]
    return None


def _is_weight(name: object, w: object) -> bool:
    return isinstance(name, str) and isinstance(w, Tensor)


def _is_embedding(state: dict[Any, Any], name: Any) -> bool:
    return _is_weight(name, state[name]) and name.endswith(EMBEDDING)


def _several(names: Iterable[Any]) -> ValueError:
    found = listing([str(name) for name in names], 4)
    return ValueError(
        f"it has weights of several models, {found}; save the right ones alone: "
        "torch.save(model.state_dict(), path)"
    )
