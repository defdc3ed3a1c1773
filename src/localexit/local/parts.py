"""Where the parts that `attach` found are in the model, and whether they still are."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


class Parts:
    """The parts of a model that exits were attached to: blocks, tail, unembedding, and the unembedding's weight.

    Code that replaces modules (`resize_token_embeddings`, for one) leaves the exits with those that were there before:
    they would train what the model does not use any more.

    Args:
        model: the model.
        modules: its parts.
        unembedding: one of them.
    """

    def __init__(self, model: nn.Module, modules: Iterable[nn.Module], unembedding: nn.Linear) -> None:
        names = {id(module): name for name, module in model.named_modules()}
        # Every step on the way from the model to a part, each once: its name, who holds it, under which key.
        self._held: dict[str, tuple[nn.Module, str, nn.Module]] = {}
        for module in modules:
            holder, path = model, ""
            for key in filter(None, names[id(module)].split(".")):
                path = f"{path}.{key}" if path else key
                held = holder.get_submodule(key)
                self._held[path] = (holder, key, held)
                holder = held
        self._unembedding = unembedding
        self._weight = unembedding.weight

    def check(self) -> None:
        """Refuse a model of which a part was replaced; one that was wrapped is where it was.

        Raises:
            ValueError: so it is.
        """
        for path, (holder, key, part) in self._held.items():
            now = holder._modules.get(key)
            if now is part:
                continue
            if now is None or all(module is not part for module in now.modules()):
                raise ValueError(_replaced(f"{path} is another module"))
            self._held[path] = (holder, key, now)
        if self._unembedding.weight is not self._weight:
            raise ValueError(_replaced("the unembedding's weight is another parameter"))


def _replaced(what: str) -> str:
    return (
        f"{what} than at attach(), so the exits would train what the model does not use any more; call remove() on the "
        f"LocalModel and attach again, after whatever replaces parts of the model (resize_token_embeddings, for one)"
    )
