"""The types that flow between the nodes besides ComfyUI's own."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..tmpo_trainer import tree
from .images import thumbs, unlike

CATEGORY = "TMPO"


def finite(value: Any) -> float | None:
    """A number for JSON, which has none that are not finite."""
    return float(value) if math.isfinite(value) else None


#: A fingerprint has so many bits of how a tree's pictures look. Two fingerprints of one tree may differ in `LOOSE` of them:
#: another batch size or device changes pixels a little. In the mean, independent pictures differ in half of the bits.
BITS, LOOSE = 32, 3

TreeSocket = io.Custom("TMPO_TREE")
ScoresSocket = io.Custom("TMPO_SCORES")


@dataclass(eq=False)
class Tree:
    """What a tree sampler returns besides its latents. Leaf l of prompt p is row l * prompts + p.

    sigmas: those of all steps. log_probs: those of the edges. seed: the noise's. previews: {step: x0 of the nodes evaluated
    there, `[width, C, h, w]` as the VAE takes them} at branch steps. colours: the same as small pictures `[width, h, w, 3]`
    in 0..1, by the latent format's linear map; empty if the format has no map. first: the first leaves as the VAE takes
    them; empty if noise is left in them for another sampler. denoise: Tree Sampler's; 1 for given sigmas. solver: of
    the steps without noise.
    """

    plan: tree.TreePlan
    kernel: str
    eta: float
    sigmas: list[float]
    log_probs: Tensor
    seed: int
    evaluations: int
    previews: dict[int, Tensor]
    colours: dict[int, Tensor]
    first: Tensor
    denoise: float = 1.0
    solver: str = "euler"

    @property
    def prompts(self) -> int:
        return self.plan.trees

    @property
    def leaves(self) -> int:
        """The number of leaves of all prompts."""
        return self.plan.leaves

    def check(self, count: int, what: str) -> None:
        """Raises ValueError unless a batch has as many entries as this tree has leaves."""
        if count != self.leaves:
            raise ValueError(
                f"{what} has {count} entries, but the tree has {self.leaves} leaves: connect both to the same tree sampler"
            )

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits by which a choice remembers its tree: 8 of its seed and settings, 8 of its pictures."""
        settings = (self.seed, self.plan, [f"{sigma:.4f}" for sigma in self.sigmas], self.kernel, self.eta)
        exact = hashlib.blake2b(repr(settings).encode(), digest_size=4).hexdigest()
        shown = self.first if len(self.first) else next(iter(self.previews.values()), torch.zeros(1, 3, 8, 8))[:1]
        # The first of the frames, if there are any. Only what differs within a picture counts.
        small = torch.nn.functional.adaptive_avg_pool2d(shown[:, :, 0] if shown.dim() == 5 else shown, 8).float()
        small = (small - small.mean((2, 3), keepdim=True)).flatten()
        directions = torch.randn(BITS, len(small), generator=torch.Generator().manual_seed(0))
        look = sum(1 << bit for bit, side in enumerate((directions @ small > 0).tolist()) if side)
        return f"{exact}{look:08x}"

    def looks_like(self, fingerprint: str) -> bool:
        """Whether a fingerprint is that of this tree, sampled again perhaps."""
        own = self.fingerprint
        if len(fingerprint) != len(own) or fingerprint[:8] != own[:8]:
            return False
        return (int(fingerprint[8:], 16) ^ int(own[8:], 16)).bit_count() <= LOOSE

    def paths(self) -> list[tuple[int, ...]]:
        """The path of every leaf: its root, then the child taken at each branch point."""
        paths = [(root,) for root in range(self.plan.roots)]
        for children in self.plan.fanout.values():
            paths = [(*path, child) for child in range(children) for path in paths]
        return paths


@dataclass
class Scores:
    """Named scores of a batch, float32 `[N]` each. Nodes sort and colour by the first one.

    seen: `thumbs` of the pictures that were scored. picked: which of these are left, in this order; None for all.
    """

    values: dict[str, Tensor]
    prompts: list[str]
    seen: Tensor
    picked: list[int] | None = None

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    def first(self) -> Tensor:
        return next(iter(self.values.values()))

    def pick(self, indices: list[int]) -> Scores:
        chosen = torch.tensor(indices, dtype=torch.long)
        return Scores(
            {n: v[chosen] for n, v in self.values.items()},
            [self.prompts[i] for i in indices],
            self.seen[chosen],
            [i if self.picked is None else self.picked[i] for i in indices],
        )

    def check(self, images: Tensor, what: str = "scores") -> None:
        """Raises ValueError unless a batch is the one that was scored. Its pictures may have been resized or corrected."""
        if len(self) != len(images):
            raise ValueError(
                f"{what} has {len(self)} entries for {len(images)} images: connect the scores of these images"
            )
        if unlike(self.seen, thumbs(images)):
            raise ValueError(f"{what} belong to other images: score these, or connect the images that were scored")
