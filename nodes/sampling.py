"""Tree samplers: independent seeds and branches of one denoising run, every unique node evaluated once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.patcher_extension
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy_api.latest import io
from torch import Tensor

from ..tmpo_trainer import flow, tree
from .types import CATEGORY, Tree, TreeSocket

KERNELS = ["cps", "flow_sde", "dance"]
#: Most pictures in the live preview.
PREVIEWED = 9
#: Most leaves of all prompts: beyond this a typing error is likelier than a wish.
MOST_LEAVES = 1024

BRANCH_TIP = (
    "At which steps the run branches, counted from 1. A branch at step 1 means independent seeds; a later one draws new noise "
    "in the middle, so pictures share what was settled before."
)


class TreeSampler(comfy.samplers.Sampler):
    """A rollout of `tree.rollout` behind ComfyUI's guider, with masks, guidance, LoRAs and hooks as the guider has them.

    One object per run: `tree` has what the last run left.
    """

    def __init__(
        self,
        branch_steps: tuple[int, ...],
        branching: int,
        kernel: flow.Kernel,
        eta: float,
        max_batch: int,
        progress: Callable[[int, int, Tensor], None] | None = None,
    ):
        self.branch_steps, self.branching = branch_steps, branching
        self.kernel, self.eta, self.max_batch, self.progress = kernel, eta, max_batch, progress
        self.tree: Tree | None = None

    def plan(self, steps: int, prompts: int) -> tree.TreePlan:
        """Raises ValueError for branch steps that do not fit."""
        late = [step for step in self.branch_steps if step > steps]
        if late:
            raise ValueError(
                f"branch step {late[0]} lies beyond the {steps} steps of these sigmas: choose 1 to {steps}"
            )
        plan = tree.TreePlan.tmpo(steps, self.branch_steps, self.branching).forest(prompts)
        if plan.leaves > MOST_LEAVES:
            raise ValueError(f"{plan.leaves} leaves: fewer branch steps or a smaller branching (at most {MOST_LEAVES})")
        return plan

    def largest(self, plan: tree.TreePlan) -> int:
        """Latents in the largest call of the model."""
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
        sampling = model_wrap.inner_model.model_sampling
        if not isinstance(sampling, comfy.model_sampling.CONST):
            raise ValueError(
                "the tree sampler is for flow-matching models (SD3, SD3.5, FLUX and the like); this one is not: use KSampler"
            )
        prompts, seed = len(noise), extra_args.get("seed") or 0
        plan = self.plan(len(sigmas) - 1, prompts)
        if plan.roots > prompts and not torch.count_nonzero(noise):
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
        sources = [tree.keyed_noise((seed, p), noise.shape[1:]) for p in range(prompts)]
        # Root 0 of a prompt starts from the noise that was given, as any sampler does.
        given = [noise if r == 0 else self._roots(sources, r).to(noise) for r in range(plan.roots // prompts)]
        starts = [
            sampling.noise_scaling(sigmas[0], start, latent, self.max_denoise(model_wrap, sigmas)) for start in given
        ]
        raw, roots = torch.cat(given), torch.cat(starts)

        def draw(step: int, path: tree.Path) -> Tensor:
            if step == 0:
                return roots[path[0]]
            root, prompt = divmod(path[0], prompts)
            return sources[prompt](step, (root, *path[1:])).to(roots)

        model = comfy.samplers.KSamplerX0Inpaint(model_wrap, sigmas)
        options = {key: value for key, value in extra_args.items() if key != "denoise_mask"}
        #: Rows of the step that is being evaluated: the noise of a masked region is its root's.
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

        whole: list[Tensor] = []
        previews: dict[int, list[Tensor]] = {}
        colours: dict[int, list[Tensor]] = {}
        bounds = [sum(plan.widths[:step]) for step in range(1, plan.num_steps + 1)]

        def called(done: int, total: int, x0: Tensor) -> None:
            nonlocal asked
            step = next(i for i, bound in enumerate(bounds, 1) if done <= bound)
            if step in plan.fanout:
                previews.setdefault(step, []).append(model_wrap.inner_model.process_latent_out(x0).float().cpu())
                picture = in_colour(x0, model_wrap.inner_model.latent_format)
                if picture is not None:
                    colours.setdefault(step, []).append(picture)
            whole.append(x0)
            if done in bounds:
                asked = 0
                if self.progress is None and callback is not None:
                    # As any sampler: once a step, with all that it has.
                    callback(step - 1, torch.cat(whole), torch.cat(whole), plan.num_steps)
                whole.clear()
            if self.progress is not None:
                self.progress(done, total, x0)

        run = tree.rollout(
            velocity,
            draw,
            sigmas.tolist(),
            plan,
            # Without noise exactly Euler's steps, to the bit.
            kernel=self.kernel if self.eta else "ode",
            eta=self.eta,
            max_batch=self.largest(plan),
            callback=called,
        )
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
        )
        return sampling.inverse_noise_scaling(sigmas[-1], run.leaves)

    @staticmethod
    def _roots(sources: list[tree.Noise], root: int) -> Tensor:
        return torch.stack([source(0, (root,)) for source in sources])


def in_colour(x0: Tensor, latent_format: Any) -> Tensor | None:
    """Latents as the network has them, `[n, C, h, w]` (or with frames), as `[n, h, w, 3]` in 0..1: ComfyUI's latent2rgb."""
    if latent_format.latent_rgb_factors is None:
        return None
    x0 = x0[:, :, 0] if x0.dim() == 5 else x0
    factors = torch.tensor(latent_format.latent_rgb_factors)
    if len(factors) != x0.shape[1]:
        # Formats that fold their latents first. It is only a preview.
        return None
    bias = torch.tensor(latent_format.latent_rgb_factors_bias or [0.0, 0.0, 0.0])
    return ((x0.float().cpu().movedim(1, -1) @ factors + bias + 1) / 2).clamp(0, 1)


def live_preview(guider: Any) -> Callable[[int, int, Tensor], None]:
    """Progress in model evaluations, with the pictures of several branches side by side."""
    previewer = latent_preview.get_previewer(guider.model_patcher.load_device, guider.model_patcher.model.latent_format)
    bar = comfy.utils.ProgressBar(1)

    def progress(done: int, total: int, x0: Tensor) -> None:
        picture = None
        if previewer is not None:
            side = int(min(PREVIEWED, len(x0)) ** 0.5)
            chosen = x0[torch.linspace(0, len(x0) - 1, side * side).long()]
            # Previewers look at the first row alone: a square of pictures in one.
            rows = [torch.cat(list(chosen[first : first + side]), -1) for first in range(0, side * side, side)]
            picture = previewer.decode_latent_to_preview_image("JPEG", torch.cat(rows, -2)[None])
        bar.update_absolute(done, total, picture)

    return progress


def sample_tree(
    guider: Any, noise: Any, sigmas: Tensor, latent: dict[str, Any], sampler: TreeSampler
) -> tuple[dict[str, Any], Tree]:
    """Runs a tree sampler as SamplerCustomAdvanced runs any: LATENT of all leaves, and the tree."""
    if len(sigmas) < 2:
        raise ValueError("these sigmas have no steps: give a scheduler at least one")
    samples = comfy.sample.fix_empty_latent_channels(guider.model_patcher, latent["samples"])
    start = {**latent, "samples": samples}
    plan = sampler.plan(len(sigmas) - 1, len(samples))
    sampler.progress = live_preview(guider)
    largest = sampler.largest(plan)
    # ComfyUI reserves memory by the latents it sees, the roots; the largest batch is what will be asked for.
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
    out = {key: value for key, value in latent.items() if key not in ("batch_index", "noise_mask")}
    out["samples"] = leaves.to(comfy.model_management.intermediate_device())
    assert sampler.tree is not None
    return out, sampler.tree


def parse_steps(text: str) -> tuple[int, ...]:
    """`1, 3, 5` -> (1, 3, 5). Raises ValueError that says what is wrong."""
    try:
        steps = tuple(int(word) for word in text.replace(",", " ").split())
    except ValueError:
        raise ValueError(f"branch steps {text!r}: write numbers, e.g. 1, 3, 5") from None
    if not steps or list(steps) != sorted(set(steps)) or steps[0] < 1:
        raise ValueError(f"branch steps {text!r} must increase and count from 1, e.g. 1, 3, 5")
    return steps


def _tree_inputs() -> list[Any]:
    return [
        io.String.Input("branch_steps", default="1, 3, 5", tooltip=BRANCH_TIP),
        io.Int.Input("branching", default=3, min=1, max=16, tooltip="Children at each branch point."),
        io.Combo.Input(
            "kernel",
            options=KERNELS,
            default="cps",
            tooltip="How noise is added at a branch point: cps keeps the amount of noise right (TMPO), flow_sde is "
            "Flow-GRPO's, dance DanceGRPO's.",
        ),
        io.Float.Input(
            "eta",
            default=0.7,
            min=0.0,
            max=2.0,
            step=0.05,
            tooltip="How much noise a branch draws; 0 makes all branches of a seed alike. At most 1 for cps.",
        ),
        io.Int.Input(
            "max_batch",
            default=9,
            min=0,
            max=256,
            tooltip="Most latents in one call of the model, 0 for no limit. Lower it if memory runs out; the pictures stay "
            "the same.",
        ),
    ]


def _sampler(branch_steps: str, branching: int, kernel: str, eta: float, max_batch: int) -> TreeSampler:
    if kernel == "cps" and eta > 1:
        raise ValueError(f"eta {eta} is too large for kernel cps: at most 1")
    return TreeSampler(parse_steps(branch_steps), branching, kernel, eta, max_batch)  # type: ignore[arg-type]


class TreeSamplerAdvanced(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TMPO_TreeSamplerAdvanced",
            display_name="Tree Sampler (advanced)",
            category=CATEGORY,
            description="Samples a tree of pictures: branches share all steps before they part, each evaluated once.",
            inputs=[
                io.Noise.Input(
                    "noise", tooltip="Noise of the first seed; the others and the branches follow from its seed."
                ),
                io.Guider.Input("guider", tooltip="Model and prompts, e.g. from CFGGuider or BasicGuider."),
                io.Sigmas.Input("sigmas", tooltip="Noise levels, e.g. from BasicScheduler."),
                io.Latent.Input(
                    "latent_image", tooltip="Size of the pictures; a batch gives a tree for each of its latents."
                ),
                *_tree_inputs(),
            ],
            outputs=[
                io.Latent.Output(display_name="leaves", tooltip="All leaves as a batch, in the order of the tree."),
                TreeSocket.Output(display_name="tree"),
            ],
        )

    @classmethod
    def execute(
        cls, noise, guider, sigmas, latent_image, branch_steps, branching, kernel, eta, max_batch
    ) -> io.NodeOutput:
        sampler = _sampler(branch_steps, branching, kernel, eta, max_batch)
        return io.NodeOutput(*sample_tree(guider, noise, sigmas, latent_image, sampler))


class _Seeded:
    def __init__(self, seed: int):
        self.seed = seed

    def generate_noise(self, latent: dict[str, Any]) -> Tensor:
        return comfy.sample.prepare_noise(latent["samples"], self.seed, latent.get("batch_index"))


class TreeSamplerNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TMPO_TreeSampler",
            display_name="Tree Sampler",
            category=CATEGORY,
            description="Like KSampler, but for a whole tree of pictures: branches share all steps before they part.",
            inputs=[
                io.Model.Input("model", tooltip="A flow-matching model: SD3, SD3.5, FLUX."),
                io.Conditioning.Input("positive", tooltip="The prompt."),
                io.Conditioning.Input("negative", tooltip="What to avoid; without effect at cfg 1."),
                io.Latent.Input("latent_image", tooltip="Size of the pictures; a batch gives a tree for each of its latents."),
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True,
                    tooltip="Seed of all noise: the same seed gives the same tree.",
                ),
                io.Int.Input("steps", default=10, min=1, max=200, tooltip="Denoising steps."),
                io.Float.Input(
                    "cfg", default=1.0, min=0.0, max=30.0, step=0.1,
                    tooltip="Classifier-free guidance: 4 to 5 for SD3.5, 1 for FLUX.",
                ),
                io.Combo.Input(
                    "scheduler", options=comfy.samplers.SCHEDULER_NAMES, default="normal",
                    tooltip="Noise levels; normal is diffusers' for SD3, simple that for FLUX.",
                ),
                *_tree_inputs(),
            ],
            outputs=[
                io.Latent.Output(display_name="leaves", tooltip="All leaves as a batch, in the order of the tree."),
                TreeSocket.Output(display_name="tree"),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, positive, negative, latent_image, seed, steps, cfg, scheduler, branch_steps, branching, kernel, eta,
        max_batch,
    ) -> io.NodeOutput:  # fmt: skip
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps).cpu()
        sampler = _sampler(branch_steps, branching, kernel, eta, max_batch)
        return io.NodeOutput(*sample_tree(guider, _Seeded(seed), sigmas, latent_image, sampler))


class TreeSamplerObject(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TMPO_TreeSamplerSelect",
            display_name="Tree Sampler (SAMPLER)",
            category=CATEGORY,
            description="The tree sampler for SamplerCustomAdvanced and the like; its output batch has all leaves.",
            inputs=_tree_inputs(),
            outputs=[io.Sampler.Output(display_name="sampler")],
        )

    @classmethod
    def execute(cls, branch_steps, branching, kernel, eta, max_batch) -> io.NodeOutput:
        return io.NodeOutput(_sampler(branch_steps, branching, kernel, eta, max_batch))


class BranchScheduleNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TMPO_BranchSchedule",
            display_name="Branch Schedule",
            category=CATEGORY,
            description="The branch steps that training would draw at some point of its curriculum.",
            inputs=[
                io.Int.Input("steps", default=6, min=2, max=200, tooltip="Denoising steps."),
                io.String.Input("early", default="1, 2, 3", tooltip="Mean branch steps at the beginning of training."),
                io.String.Input("late", default="1, 3, 5", tooltip="Mean branch steps at its end."),
                io.Float.Input(
                    "progress", default=0.0, min=0.0, max=1.0, step=0.01, tooltip="How far training is, 0 to 1."
                ),
                io.Float.Input(
                    "kappa", default=6.0, min=0.1, max=1000.0, step=0.1,
                    tooltip="How near to the means the steps are; 2 around the middle is uniform.",
                ),
                io.Int.Input("seed", default=0, min=0, max=0x7FFFFFFF, control_after_generate=True, tooltip="Of the draw."),
                io.Sigmas.Input(
                    "sigmas", optional=True, tooltip="Optional: the last step that can carry noise follows from them."
                ),
            ],
            outputs=[io.String.Output(display_name="branch_steps", tooltip="For a tree sampler.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, steps, early, late, progress, kappa, seed, sigmas=None) -> io.NodeOutput:
        if sigmas is not None and len(sigmas) != steps + 1:
            raise ValueError(f"steps is {steps}, but these sigmas have {len(sigmas) - 1}")
        last = None if sigmas is None else flow.last_stochastic_step(sigmas)
        schedule = tree.BranchSchedule(steps, parse_steps(early), parse_steps(late), kappa, 1000, seed, last)
        return io.NodeOutput(", ".join(map(str, schedule.steps(round(1000 * progress)))))
