"""Compares solvers on the demo model: whole samples with 100 Euler steps, a tree's leaves with their exact continuation.

Two tables, for the base or with `--lora`, from noise that all rows share. agree: share of pictures with the reference's
strict score. correlation: of the strict scores within a prompt. cosine: mean cosine distance of EfficientNet features to the
reference's picture. rms: distance of the latents. Training offers `euler` and `ab2`; order 3 (`ab3`), DPM-Solver++(2M) (`dpm`)
and `ab2` with the velocity from before the branch are here to show why not those.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tmpo_trainer import tree
from tmpo_trainer.backbones import load_backbone
from tmpo_trainer.backbones.base import Backbone, LoadOptions
from tmpo_trainer.commands.flags import configure, parse
from tmpo_trainer.demo.split import FOLDER
from tmpo_trainer.evaluation.features import EfficientNetLite
from tmpo_trainer.prompts.lists import read_prompts
from tmpo_trainer.rewards.shapes import ShapesScorer
from tmpo_trainer.tree import TreePlan, Velocity

#: How many velocities each solver uses.
ORDERS = {"euler": 1, "ab2": 2, "ab2, past noise": 2, "ab3": 3, "dpm": 2}
#: Solvers and steps of the first table, and of the second one after the last branch.
WHOLE = {
    "euler": (6, 10, 12, 28, 40), "ab2": (6, 8, 10, 12, 16, 20), "ab3": (6, 10, 12), "dpm": (6, 10, 12)
}  # fmt: skip
LEAVES = {"euler": (5, 4, 3, 2, 1), "ab2": (5, 4, 3, 2), "ab2, past noise": (5, 3)}
REFERENCE = 100
#: Steps of `ab2` that count as exact after the last branch.
EXACT = 60
SIZE = (64, 64)


@dataclass
class Past:
    """A network call: the latent, sigma and velocity."""

    x: Tensor
    sigma: float
    v: Tensor


def integrate(name: str, velocity: Velocity, x: Tensor, sigmas: Sequence[float], past: Sequence[Past] = ()) -> Tensor:
    """x at the last sigma by a multistep solver, which may know earlier calls."""
    known = list(past)
    for sigma, sigma_next in itertools.pairwise(sigmas):
        known = [*known, Past(x, sigma, velocity(x, x.new_full((len(x),), sigma)))][-ORDERS[name] :]
        x = (dpm if name == "dpm" else adams_bashforth)(known, sigma_next)
    return x


def adams_bashforth(known: Sequence[Past], sigma_next: float) -> Tensor:
    """A step along the polynomial through the known velocities."""
    total = known[-1].x
    for call in known:
        # The integral of the polynomial that is 1 at this call's sigma and 0 at the others'.
        others = [other.sigma for other in known if other is not call]
        basis = np.poly1d(np.poly(others) / np.prod([call.sigma - other for other in others])).integ()
        total = total + float(basis(sigma_next) - basis(known[-1].sigma)) * call.v
    return total


def dpm(known: Sequence[Past], sigma_next: float) -> Tensor:
    """A step of DPM-Solver++(2M) (arXiv:2211.01095), which extrapolates the clean latent over the log of signal to noise."""
    now, data = known[-1], [call.x - call.sigma * call.v for call in known]
    if sigma_next == 0 or len(known) == 1 or known[0].sigma >= 1:
        return now.x + (sigma_next - now.sigma) * now.v
    before, here, there = (math.log((1 - s) / s) for s in (known[0].sigma, now.sigma, sigma_next))
    share = (there - here) / (here - before) / 2
    mixed = (1 + share) * data[1] - share * data[0]
    return sigma_next / now.sigma * now.x + (1 - sigma_next) * (1 - math.exp(here - there)) * mixed


@dataclass
class Pictures:
    """n pictures of each of P prompts: latents `[P, n, ...]`, strict scores `[P, n]`, unit features `[P, n, D]`."""

    latents: Tensor
    strict: Tensor
    features: Tensor


class Judge:
    """Decodes latents of some prompts and measures the pictures."""

    def __init__(self, backbone: Backbone):
        self.backbone, self.scorer, self.features = backbone, ShapesScorer(), EfficientNetLite(torch.device("cpu"))

    def __call__(self, latents: Tensor, prompts: Sequence[str]) -> Pictures:
        """Rows are laid out as a forest's: row r belongs to prompts[r % P]."""
        count = len(prompts)
        images = self.backbone.decode(latents, 8)
        strict, _ = self.scorer.score_both(images, list(prompts) * (len(latents) // count))
        features = torch.nn.functional.normalize(self.features(images), dim=1)
        found = (value.unflatten(0, (-1, count)).transpose(0, 1) for value in (latents, strict, features))
        return Pictures(*found)


def joined(parts: Sequence[Pictures]) -> Pictures:
    return Pictures(*(torch.cat(part) for part in zip(*(vars(part).values() for part in parts), strict=True)))


def row(name: str, steps: int, found: Pictures, reference: Pictures) -> str:
    own, other = (p.strict - p.strict.mean(1, keepdim=True) for p in (found, reference))
    correlation = (own * other).sum() / (own.square().sum() * other.square().sum()).sqrt()
    cosine = 1 - (found.features * reference.features).sum(-1).mean()
    rms = (found.latents - reference.latents).square().mean().sqrt()
    agree = (found.strict == reference.strict).float().mean()
    return (
        f"| {name} | {steps} | {found.strict.mean():.3f} | {agree:.3f} | {correlation:.3f} | {cosine:.4f} | {rms:.3f} | "
        f"{found.latents.std():.3f} |"
    )


HEAD = (
    "| solver | steps | strict | agree | correlation | cosine | rms | latent std |\n|---|---|---|---|---|---|---|---|"
)


def spaced(sigmas: Tensor, steps: int) -> list[float]:
    """As many steps, evenly spaced on the curve of `sigmas`, as `tree.shortened_sigmas` spaces them."""
    places = np.linspace(0, len(sigmas) - 1, steps + 1)
    return np.interp(places, np.arange(len(sigmas)), sigmas.double()).tolist()


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks solvers", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--lora", type=Path, help="a LoRA of the demo model; by default the base is measured")
    parser.add_argument("--prompts", type=int, default=60, help="of the validation list")
    parser.add_argument("--images", type=int, default=16, help="pictures per prompt in the first table")
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    backbone = load_backbone("demo", LoadOptions(torch.float32, torch.device("cpu"), 0))
    if args.lora:
        backbone.pipeline.load_lora_weights(args.lora)
    judge, shape = Judge(backbone), backbone.latent_shape(*SIZE)
    prompts = read_prompts(FOLDER / "validation.txt").texts[: args.prompts]
    groups = [prompts[first : first + 8] for first in range(0, len(prompts), 8)]

    def noise(chosen: Sequence[str]) -> tree.Noise:
        sources = [tree.keyed_noise((args.seed, prompt), shape) for prompt in chosen]
        return lambda step, path: sources[path[0] % len(chosen)](step, (path[0] // len(chosen), *path[1:]))

    def whole(name: str, steps: int) -> Pictures:
        sigmas, parts = backbone.sigmas(steps, *SIZE).tolist(), []
        for chosen in groups:
            drawn = noise(chosen)
            x = torch.stack([drawn(0, (root,)) for root in range(args.images * len(chosen))])
            parts.append(judge(integrate(name, backbone.velocity(chosen, 1), x, sigmas), chosen))
        return joined(parts)

    print(
        f"{len(prompts)} prompts x {args.images} pictures, seed {args.seed}, reference: {REFERENCE} Euler steps\n{HEAD}"
    )
    reference = whole("euler", REFERENCE)
    print(row("euler", REFERENCE, reference, reference), flush=True)
    for name, counts in WHOLE.items():
        for steps in counts:
            print(row(name, steps, whole(name, steps), reference), flush=True)

    config, _ = configure(*parse(["--preset", "demo", "--method", "tmpo"]), None)
    plan = TreePlan.tmpo(config.rollout_steps, config.branch_early, config.branching)
    last, sigmas = max(plan.fanout), backbone.sigmas(config.rollout_steps, *SIZE)
    stem = TreePlan(last, plan.roots, plan.fanout)
    leaves: dict[tuple[str, int], list[Pictures]] = {}
    for chosen in groups:
        velocity = backbone.velocity(chosen, 1)
        run = tree.rollout(
            velocity, noise(chosen), sigmas[: last + 1], stem.forest(len(chosen)), kernel="flow_sde", eta=1.0
        )
        parents = run.branches[-1]
        before = velocity(parents.x, torch.full((len(parents.x),), parents.sigma))
        past = [Past(run.leaves, parents.sigma, tree.tile(before, config.branching))]
        jobs = [("ab2", EXACT), *((name, steps) for name, counts in LEAVES.items() for steps in counts)]
        for name, steps in jobs:
            known = past if name == "ab2, past noise" else []
            end = integrate(name, velocity, run.leaves, spaced(sigmas[last:], steps), known)
            leaves.setdefault((name, steps), []).append(judge(end, chosen))
    exact = joined(leaves.pop(("ab2", EXACT)))
    print(
        f"\nTMPO's trees in preset demo, {plan.leaves} leaves, steps after the last branch (its sigmas have 5)\n{HEAD}"
    )
    print(row("exact", EXACT, exact, exact))
    for (name, steps), parts in leaves.items():
        print(row(name, steps, joined(parts), exact))
    return 0
