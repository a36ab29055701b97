"""Agreement between several processes, and tensors that are sharded over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from .settings.errors import ConfigError, one_line

Loaded = TypeVar("Loaded")


class OtherProcessFailed(RuntimeError):
    """Another process has an error; this one stops with it."""


class Processes:
    """The processes of a run, by their accelerator; without one, this process alone.

    Attributes:
        count, rank, main: their number, the rank of this one, and whether it is the one that writes files.
        agreed: whether all know of the error that ends the run, so that they can still act together.
    """

    def __init__(self, accelerator: Accelerator | None = None):
        self.count, self.rank, self.main = 1, 0, True
        if accelerator is not None:
            self.count, self.rank = accelerator.num_processes, accelerator.process_index
            self.main = accelerator.is_main_process
        self.agreed = self.count == 1

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of their ranks."""
        return gather_object([value]) if self.count > 1 else [value]

    def broadcast(self, value: Any) -> Any:
        """The value of the first process."""
        if self.count == 1:
            return value
        shared = [value]
        broadcast_object_list(shared)
        return shared[0]

    def agree(self, error: Exception | None) -> None:
        """Raises on all processes if one has an error. Otherwise they would wait for it forever in the next collective."""
        if self.count > 1:
            texts = self.gather(None if error is None else f"{type(error).__name__}: {error}")
            failed = [f"process {rank}: {text}" for rank, text in enumerate(texts) if text is not None]
            self.agreed = bool(failed)
            if failed and error is None:
                raise OtherProcessFailed("; ".join(failed))
        if error is not None:
            raise error


def together(accelerator: Accelerator, load: Callable[[], Loaded]) -> Loaded:
    """Calls `load` on every process. A ConfigError, or the death, of one is a ConfigError on all: the first prints it."""
    if accelerator.num_processes == 1:
        return load()
    loaded: list[Loaded] = []
    own = None
    try:
        loaded.append(load())
    except ConfigError as error:
        own = f"process {accelerator.process_index}: {error}"
    try:
        texts = gather_object([own])
    except RuntimeError as error:
        # Its connection closed: it was killed, or ran out of memory.
        raise ConfigError(own or f"another process died while the run was loaded ({one_line(error, 120)})") from None
    for text in texts:
        if text is not None:
            raise ConfigError(text)
    return loaded[0]


def whole(value: Tensor) -> Tensor:
    """The whole tensor on every process, gathered if it is sharded."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """Shards a whole tensor as a parameter is sharded."""
    if not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
