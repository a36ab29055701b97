"""How much device memory a run needs, phase by phase, from the model's configs: nothing is loaded, no GPU is asked.

The real network code runs on fake tensors, which have shapes and no data, while every storage that it makes and frees is
counted: forward, checkpointed backward, decoding. What the count leaves out: the CUDA context (about 0.5 GiB) and the
allocator's unused share of its blocks.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .. import methods, tree
from ..backbones.base import Backbone, decoder_calls
from ..lora.adapter import attach
from ..methods import data
from ..methods.base import Method
from ..settings.config import TrainConfig

#: Bytes per weight in NF4 with double quantisation: 4 bits, 8 bits per block of 64, 32 bits per 256 of those.
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)

GIB = 2**30


class Peak(TorchDispatchMode):
    """Counts the bytes of storages that are made, or met, and are still alive.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def ignore(self, module: torch.nn.Module) -> None:
        """A module's weights and gradients are not counted: they are known."""
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        self.ignore_tensors([*module.parameters(), *module.buffers(), *gradients])

    def ignore_tensors(self, tensors: Iterable[torch.Tensor]) -> None:
        """Tensors that are known, and stay."""
        self._alive |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive:
            self._alive.add(key)
            weakref.finalize(storage, self._gone, key, size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def _gone(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


def fake(module: torch.nn.Module) -> None:
    """Turns a module on the meta device into one of fake CPU tensors, inside a FakeTensorMode.

    On the CPU and not on meta: there attention takes the kernel that keeps no matrix of scores, as on a GPU.
    """
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                made = torch.empty(value.shape, dtype=value.dtype)
                part._parameters[name] = torch.nn.Parameter(made, value.requires_grad)
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = torch.empty(value.shape, dtype=value.dtype)


def weight_bytes(module: torch.nn.Module, nf4: bool = False) -> int:
    """Bytes of a module's parameters; with `nf4`, its linear layers' weights are quantised."""
    total = sum(p.numel() * p.element_size() for p in module.parameters())
    if nf4:
        for part in module.modules():
            if isinstance(part, torch.nn.Linear):
                total += int(part.weight.numel() * (NF4 - part.weight.element_size()))
    return total


def estimate(
    skeleton: Backbone,
    folder: Path,
    config: TrainConfig,
    method: Method,
    plans: Sequence[tree.TreePlan],
    device: torch.device,
) -> dict[str, dict[str, int]]:
    """Bytes on one device, `{phase: {part: bytes}}`; a phase needs the sum of its parts.

    For a whole transformer on the device: FSDP2 divides it, the LoRA and the optimiser by the number of devices.

    Args:
        skeleton: from `Backbone.skeleton`; it gets the run's adapter and is of no use afterwards.
        folder: the model's. method: of the run. plans: of one prompt, all that the run may meet. device: of the run.
    """
    transformer, vae = skeleton.transformer, skeleton.vae
    text = {"text encoders": skeleton.text_encoder_bytes(folder, transformer.dtype)}
    weights = weight_bytes(transformer, config.quantize == "nf4")
    decoder = weight_bytes(vae)
    with torch.device("meta"):
        attach(transformer, skeleton.adapter(config.lora_targets, config.lora_rank, config.lora_alpha))
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    lora = sum(p.numel() * p.element_size() for p in transformer.parameters() if p.requires_grad)
    together = min(config.prompts_per_batch, config.prompts_per_update)
    shape = skeleton.latent_shape(*config.resolution)
    latent = 4 * math.prod(shape)

    images = data.images(config)
    stored = (max(map(method.keeps, plans)) + images) * config.prompts_per_update * latent
    width = max(max(plan.widths) for plan in plans) * together
    counts = [method.evaluations(plan) for plan in plans]
    trained = max(images, *(methods.trained(each, config.inner_updates) for each in counts)) * together
    kept = max(each.get("backward", 0) for each in counts) * config.prompts_per_update
    rollout = tree.chunk_size(width, together, config.max_batch)
    replay = kept or tree.chunk_size(trained, together, config.replay_batch)
    decode = min(
        max(plan.leaves for plan in plans) * together, math.prod(decoder_calls(config.decode_batch, shape, device))
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake(transformer)
        fake(vae)
        velocity = _network(skeleton, folder, config.guidance, together)
        forward = peak_bytes(transformer, lambda: velocity(rollout, shape), gradient=False)
        backward = peak_bytes(transformer, lambda: velocity(replay, shape).sum().backward(), gradient=True)
        unscaled = skeleton.unscale(torch.empty(decode, *shape))
        # The VAE's input counts too: it is made while pictures are decoded.
        decoding = peak_bytes(vae, lambda: skeleton.vae_pixels(unscaled.clone()), gradient=False)
    resident = {
        "transformer": weights,
        "VAE": decoder,
        # Weights, gradient (which stays until the next replay), two moments, average; the method's copies.
        "LoRA, optimiser, average": (5 + method.copies) * lora,
        "latents kept": stored,
    }
    # From the rollout to the replay, which then has no forward pass.
    graphs = {"activations kept": backward} if kept else {}
    # Those of the current policy, while another one's are in their place.
    aside = {"LoRA kept aside": lora} if method.swaps else {}
    phases = {
        f"rollout, {rollout} latents a call": resident | graphs | aside | {"forward": forward},
        f"decoding, {decode} latents a call": resident | graphs | aside | {"decoder": decoding},
        f"replay, {replay} latents a call": resident | {"forward and backward": backward},
        "optimiser": resident | {"temporaries": lora},
        # The trained weights are kept aside while the averaged ones draw.
        "sample grids, evaluation": resident | {"LoRA kept aside": lora, "forward or decoder": max(forward, decoding)},
    }
    if skeleton.frees_text_encoders(folder):
        return {"text encoding": text} | phases
    return {phase: text | parts for phase, parts in phases.items()}


def peak_bytes(module: torch.nn.Module, work: Callable[[], object], gradient: bool) -> int:
    """Bytes beyond a module's weights, and their gradients, while something runs."""
    if gradient:
        for parameter in module.parameters():
            if parameter.requires_grad and parameter.grad is None:
                # In the second part of a replay it is there from the start.
                parameter.grad = torch.zeros_like(parameter)
    with Peak() as peak, torch.set_grad_enabled(gradient):
        peak.ignore(module)
        work()
    return peak.peak


def _network(
    skeleton: Backbone, folder: Path, guidance: float, prompts: int
) -> Callable[[int, tuple[int, ...]], torch.Tensor]:
    """The backbone's own velocity on made-up text: (rows, shape of a latent) -> network output."""
    names = [str(i) for i in range(prompts)]
    for name in [*names, ""]:
        skeleton.keep(name, skeleton.blank_conditioning(folder))
    network = skeleton.velocity(names, guidance)
    return lambda rows, shape: network(torch.empty(rows, *shape), torch.full((rows,), 0.5))
