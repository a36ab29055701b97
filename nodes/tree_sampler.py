"""The tree sampler: independent seeds and branches in one denoising run, with every unique node evaluated once."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.patcher_extension
import comfy.sample
import comfy.samplers
import torch
from torch import Tensor

from ..tmpo_trainer import flow, tree
from .live import Live, in_colour
from .types import Tree

#: Leaves that a tree keeps in order to recognise its pictures. A single one could resemble another tree's by chance.
FIRST = 3
#: At most this many leaves of all prompts. A larger number is more likely a typing error.
MOST_LEAVES = 1024


class TreeSampler(comfy.samplers.Sampler):
    """Runs `tree.rollout` behind ComfyUI's guider, which applies masks, guidance, LoRAs and hooks as usual.

    Each run needs its own object, which holds the sampled tree in `tree` afterwards.
    """

    def __init__(
        self,
        branch_steps: tuple[int, ...],
        branching: int,
        kernel: flow.Kernel,
        eta: float,
        max_batch: int,
        solver: flow.Solver,
        progress: Callable[[int, int, Tensor], None] | None = None,
    ):
        self.branch_steps, self.branching = branch_steps, branching
        self.kernel, self.eta, self.max_batch, self.solver, self.progress = kernel, eta, max_batch, solver, progress
        self.tree: Tree | None = None
        #: The path of the only leaf that is wanted, see `nodes/leaf.py`: its root, then the child at each branch point.
        self.path: tuple[int, ...] = ()
        #: If the latents were taken from another batch, their places there, which determine their noise.
        self.places: list[int] | None = None

    def plan(self, steps: int, prompts: int) -> tree.TreePlan:
        """Raises ValueError for branch steps that do not fit."""
        late = [step for step in self.branch_steps if step > steps]
        if late:
            raise ValueError(f"branch step {late[0]} is beyond the {steps} steps of these sigmas: choose 1 to {steps}")
        plan = tree.TreePlan.tmpo(steps, self.branch_steps, 1 if self.path else self.branching).forest(prompts)
        check_leaves(plan.leaves)
        return plan

    def largest(self, plan: tree.TreePlan) -> int:
        """The number of latents in the largest call of the model."""
        most = max(self.max_batch, plan.trees) if self.max_batch else None
        return tree.chunk_size(max(plan.widths), plan.trees, most)

    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        sampling = check_flow(model_wrap.inner_model.model_sampling)
        check_cache(extra_args["model_options"])
        prompts, seed = len(noise), extra_args.get("seed") or 0
        plan = self.plan(len(sigmas) - 1, prompts)
        roots = self.path[:1] or range(plan.roots // prompts)
        if max(roots) and not torch.count_nonzero(noise):
            raise ValueError(
                "no noise is added here (DisableNoise), so there are no seeds to branch: leave out branch step 1"
            )
        if not (sigmas[:-1] > sigmas[1:]).all():
            raise ValueError("these sigmas do not fall at every step: use another scheduler or fewer steps")
        last = flow.last_stochastic_step(sigmas)
        late = [step for step in plan.fanout if step > last]
        if late and self.eta:
            raise ValueError(
                f"branch step {late[0]} is too late: almost no noise is left there. Choose {last} or earlier"
            )
        latent = torch.zeros_like(noise) if latent_image is None else latent_image
        sources = [tree.keyed_noise((seed, place), noise.shape[1:]) for place in self.places or range(prompts)]
        # Root 0 of a prompt starts from the given noise, as in any sampler.
        given = [noise if root == 0 else self._roots(sources, root).to(noise) for root in roots]
        starts = [
            sampling.noise_scaling(sigmas[0], each, latent, self.max_denoise(model_wrap, sigmas)) for each in given
        ]
        raw, start = torch.cat(given), torch.cat(starts)

        def draw(step: int, path: tree.NodePath) -> Tensor:
            if step == 0:
                return start[path[0]]
            root, prompt = divmod(path[0], prompts)
            return sources[prompt](step, self.path[: len(path)] or (root, *path[1:])).to(start)

        model = comfy.samplers.KSamplerX0Inpaint(model_wrap, sigmas)
        options = {key: value for key, value in extra_args.items() if key != "denoise_mask"}
        #: Rows of the current step evaluated so far. They map a row to its root, whose noise a masked region has.
        asked = 0

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            nonlocal asked
            comfy.model_management.throw_exception_if_processing_interrupted()
            rows = torch.arange(asked, asked + len(x), device=x.device)
            asked += len(x)
            model.noise = raw[rows % len(raw)]
            model.latent_image = latent[rows % prompts]
            mask = None if denoise_mask is None else denoise_mask[rows % prompts]
            denoised = model(x, sigma, denoise_mask=mask, **options)
            return (x - denoised) / sigma.view(-1, *[1] * (x.dim() - 1))

        process = model_wrap.inner_model.process_latent_out
        whole: list[Tensor] = []
        previews: dict[int, list[Tensor]] = {}
        colours: dict[int, list[Tensor]] = {}
        bounds = list(itertools.accumulate(plan.widths))

        def called(done: int, total: int, x0: Tensor) -> None:
            nonlocal asked
            step = next(i for i, bound in enumerate(bounds, 1) if done <= bound)
            if step in plan.fanout:
                previews.setdefault(step, []).append(process(x0).float().cpu())
                picture = in_colour(x0, model_wrap.inner_model.latent_format)
                if picture is not None:
                    colours.setdefault(step, []).append(picture)
            whole.append(x0)
            if done in bounds:
                asked = 0
                if self.progress is None and callback is not None:
                    # As in any sampler, the callback gets all rows once per step.
                    callback(step - 1, torch.cat(whole), torch.cat(whole), plan.num_steps)
                whole.clear()
            if self.progress is not None:
                self.progress(done, total, x0)

        run = tree.rollout(
            velocity,
            draw,
            sigmas.tolist(),
            plan,
            # Without noise a branch step is Euler's, exact to the bit.
            kernel=self.kernel if self.eta else "ode",
            eta=self.eta,
            solver=self.solver,
            max_batch=self.largest(plan),
            callback=called,
        )
        leaves = sampling.inverse_noise_scaling(sigmas[-1], run.leaves)
        self.tree = Tree(
            plan,
            self.kernel,
            self.eta,
            sigmas.tolist(),
            run.log_probs.float().cpu() if self.eta else torch.zeros(len(run.log_probs)),
            seed,
            plan.rollout_evaluations,
            {step: torch.cat(parts) for step, parts in previews.items()},
            {step: torch.cat(parts) for step, parts in colours.items()},
            process(leaves[: FIRST if sigmas[-1] == 0 else 0]).float().cpu(),
            solver=self.solver,
        )
        return leaves

    @staticmethod
    def _roots(sources: list[tree.Noise], root: int) -> Tensor:
        return torch.stack([source(0, (root,)) for source in sources])


def check_leaves(count: int) -> None:
    """Raises ValueError for too many leaves."""
    if count > MOST_LEAVES:
        raise ValueError(
            f"the tree has {count} leaves, at most {MOST_LEAVES} are allowed: choose fewer branch steps or a smaller branching"
        )


def check_flow(sampling: Any) -> Any:
    """A model's sampling. Raises ValueError unless it is that of a flow-matching model."""
    if not isinstance(sampling, comfy.model_sampling.CONST):
        raise ValueError(
            "the tree sampler needs a flow-matching model such as FLUX, SD3.5, Qwen-Image or Z-Image: for this model use "
            "KSampler"
        )
    return sampling


def check_cache(model_options: dict[str, Any]) -> None:
    """Raises ValueError for ComfyUI's caches, which take the calls of a tree for the steps of one batch."""
    # LazyCache has the same name there.
    if "easycache" in model_options.get("transformer_options", {}):
        raise ValueError(
            "EasyCache and LazyCache compare a call of the model with the one before, which in a tree may be of other "
            "pictures: connect the model without them"
        )


#: Newer versions of ComfyUI note the scale of an empty latent: a model of another scale gets one for the same picture.
SCALES = ("downscale_ratio_spacial", "downscale_ratio_temporal")


def fitted(model: Any, latent: dict[str, Any]) -> Tensor:
    """The latents of a LATENT in the model's shape: `[N, C, h, w]`, or `[N, C, frames, h, w]` for Qwen-Image and video models.

    As in KSampler, an empty latent gets the model's channels, and pictures for a model with frames become one frame each.

    Raises:
        ValueError: these are another model's latents.
    """
    scales = {key: latent[key] for key in SCALES if key in latent}
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"], **scales)
    kind = model.get_model_object("latent_format")
    expected = (kind.latent_channels, 2 + kind.latent_dimensions)
    if (samples.shape[1], samples.dim()) != expected:
        raise ValueError(
            f"latent_image is {'x'.join(map(str, samples.shape))}, but {type(model.model).__name__} takes {expected[0]} "
            f"channels in {expected[1]} dimensions: encode the picture with this model's VAE, or connect an empty latent"
        )
    return samples


def sample_tree(
    guider: Any,
    noise: Any,
    sigmas: Tensor,
    latent: dict[str, Any],
    sampler: TreeSampler,
    workflow: str | None = None,
) -> tuple[dict[str, Any], Tree]:
    """Runs a tree sampler as SamplerCustomAdvanced runs any sampler. Returns a LATENT of all leaves, and the tree.

    workflow: the id of the one that is run, if it has one.
    """
    if len(sigmas) < 2:
        raise ValueError("these sigmas have no steps: give a scheduler at least one")
    # Before the model is loaded.
    check_flow(guider.model_patcher.get_model_object("model_sampling"))
    check_cache(guider.model_options)
    samples = fitted(guider.model_patcher, latent)
    start = {**latent, "samples": samples}
    plan = sampler.plan(len(sigmas) - 1, len(samples))
    sampler.progress = Live(guider, plan, sigmas.tolist(), noise.seed, workflow)
    sampler.places = latent.get("batch_index")
    largest = sampler.largest(plan)
    # ComfyUI would reserve memory for the latents that it sees, the roots. The largest batch needs more.
    guider = copy.copy(guider)
    guider.model_options = comfy.model_patcher.create_model_options_clone(guider.model_options)

    def reserve(executor: Any, model: Any, shape: Any, *args: Any, **kwargs: Any) -> Any:
        return executor(model, [max(largest, shape[0]), *shape[1:]], *args, **kwargs)

    comfy.patcher_extension.add_wrapper_with_key(
        comfy.patcher_extension.WrappersMP.PREPARE_SAMPLING,
        "tmpo_tree",
        reserve,
        guider.model_options,
        is_model_options=True,
    )
    leaves = guider.sample(
        noise.generate_noise(start),
        samples,
        sampler,
        sigmas,
        denoise_mask=latent.get("noise_mask"),
        disable_pbar=True,
        seed=noise.seed,
    )
    out = {key: value for key, value in latent.items() if key not in ("batch_index", *SCALES)}
    out["samples"] = leaves.to(comfy.model_management.intermediate_device())
    assert sampler.tree is not None
    return out, sampler.tree
