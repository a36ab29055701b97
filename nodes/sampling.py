"""The nodes of the tree sampler, and a node for the branch steps that training would draw."""

from __future__ import annotations

from typing import Any, get_args

import comfy.sample
import comfy.samplers
from comfy_api.latest import io
from torch import Tensor

from ..tmpo_trainer import flow, tree
from .inputs import one_of, workflow_id
from .newer import ADVANCED, aliases
from .tree_sampler import TreeSampler, check_leaves, sample_tree
from .types import CATEGORY, TreeSocket

#: Branch points of a tree. Ten with two branches each are a thousand pictures.
MOST_BRANCHES = 100
MOST_CHILDREN = 16
#: Denoising steps.
MOST_STEPS = 200
MOST_ETA = 2.0
KERNELS = ["cps", "flow_sde", "dance"]
SOLVERS = list(get_args(flow.Solver))

BRANCH_TIP = (
    "The steps at which the tree branches, counted from 1. A branch at step 1 means independent seeds. A later branch draws "
    "new noise at its step, so the pictures share what earlier steps have settled."
)


def parse_steps(text: str) -> tuple[int, ...]:
    """`1, 3, 5` -> (1, 3, 5). Raises ValueError for anything but increasing steps from 1."""
    try:
        steps = tuple(int(word) for word in text.replace(",", " ").split())
    except ValueError:
        raise ValueError(f"branch steps {text!r}: write numbers, e.g. 1, 3, 5") from None
    if len(steps) > MOST_BRANCHES:
        raise ValueError(f"branch steps: {len(steps)} of them, at most {MOST_BRANCHES}")
    if not steps or list(steps) != sorted(set(steps)) or steps[0] < 1:
        raise ValueError(f"branch steps {text!r} must increase and count from 1, e.g. 1, 3, 5")
    return steps


def check_eta(kernel: str | None, eta: float) -> None:
    """Raises ValueError for an eta that the kernel cannot take."""
    if not 0 <= eta <= MOST_ETA:
        raise ValueError(f"eta is {eta}: choose 0 to {MOST_ETA:g}")
    if kernel == "cps" and eta > 1:
        raise ValueError(f"eta {eta} is too large for kernel cps: at most 1")


def check_steps(
    branch_steps: str | None,
    steps: int | None = None,
    kernel: str | None = None,
    eta: float | None = None,
    branching: int | None = None,
) -> bool | str:
    """For `validate_inputs`: True, or what ComfyUI shows before it runs anything. An input that comes over a link is None.

    ComfyUI leaves the bounds of inputs that are checked here to this function.
    """
    if steps is not None and not 1 <= steps <= MOST_STEPS:
        return f"steps is {steps}: choose 1 to {MOST_STEPS}"
    if branching is not None and not 1 <= branching <= MOST_CHILDREN:
        return f"branching is {branching}: choose 1 to {MOST_CHILDREN}"
    try:
        found = () if branch_steps is None else parse_steps(branch_steps)
        if eta is not None:
            check_eta(kernel, eta)
        if branching is not None and found:
            check_leaves(branching ** len(found))
    except ValueError as error:
        return str(error)
    if steps is not None and found and found[-1] > steps:
        return f"branch step {found[-1]} is beyond the {steps} steps: choose 1 to {steps}"
    return True


def _tree_inputs() -> list[Any]:
    return [
        io.String.Input("branch_steps", default="1, 3, 5", tooltip=BRANCH_TIP),
        io.Int.Input(
            "branching", default=3, min=1, max=MOST_CHILDREN, tooltip="The number of children at each branch point."
        ),
        io.Combo.Input(
            "kernel",
            **ADVANCED,
            options=KERNELS,
            default="cps",
            tooltip="How noise is added at a branch point. cps keeps the amount of noise right (TMPO), flow_sde is "
            "Flow-GRPO's kernel, dance is DanceGRPO's.",
        ),
        io.Float.Input(
            "eta",
            **ADVANCED,
            default=0.7,
            min=0.0,
            max=MOST_ETA,
            step=0.05,
            tooltip="How much noise a branch draws. 0 makes all branches of a seed alike. cps allows at most 1.",
        ),
        io.Int.Input(
            "max_batch",
            default=9,
            min=0,
            max=256,
            tooltip="The largest number of latents in one call of the model, 0 for no limit. Lower it if memory runs out; the "
            "pictures stay the same.",
        ),
        # Optional, because prompts and workflows that were saved without it must still run.
        io.Combo.Input(
            "solver",
            **ADVANCED,
            options=SOLVERS,
            default="euler",
            optional=True,
            tooltip="How steps without noise are taken. ab2 is of second order and needs fewer steps for the same quality.",
        ),
    ]


def new_sampler(branch_steps: str, branching: int, kernel: str, eta: float, max_batch: int, solver: str) -> TreeSampler:
    one_of(kernel, KERNELS, "kernel")
    one_of(solver, SOLVERS, "solver")
    check_eta(kernel, eta)
    return TreeSampler(parse_steps(branch_steps), branching, kernel, eta, max_batch, solver)  # type: ignore[arg-type]


class TreeSamplerAdvanced(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TMPO_TreeSamplerAdvanced",
            display_name="Tree Sampler (advanced)",
            category=CATEGORY,
            **aliases("variations", "seed explorer", "FLUX.2 tree"),
            description="Samples a tree of pictures. Branches share all steps before they part, and each shared step is "
            "evaluated once.",
            inputs=[
                io.Noise.Input(
                    "noise", tooltip="The noise of the first root. All other noise is derived from its seed."
                ),
                io.Guider.Input("guider", tooltip="Model and prompts, e.g. from CFGGuider or BasicGuider."),
                io.Sigmas.Input("sigmas", tooltip="Noise levels, e.g. from BasicScheduler."),
                io.Latent.Input(
                    "latent_image",
                    tooltip="Sets the size of the pictures. A batch gives a tree for each of its latents.",
                ),
                *_tree_inputs(),
            ],
            outputs=[
                io.Latent.Output(display_name="leaves", tooltip="All leaves as a batch, in the order of the tree."),
                TreeSocket.Output(display_name="tree", tooltip="For Tree View, Boltzmann Weights, Score Images."),
            ],
            hidden=[io.Hidden.extra_pnginfo],
        )

    @classmethod
    def validate_inputs(cls, branch_steps=None, kernel=None, eta=None, branching=None) -> bool | str:
        return check_steps(branch_steps, None, kernel, eta, branching)

    @classmethod
    def execute(
        cls, noise, guider, sigmas, latent_image, branch_steps, branching, kernel, eta, max_batch, solver="euler"
    ) -> io.NodeOutput:
        sampler = new_sampler(branch_steps, branching, kernel, eta, max_batch, solver)
        return io.NodeOutput(*sample_tree(guider, noise, sigmas, latent_image, sampler, workflow_id(cls)))


class Seeded:
    """A NOISE, as KSampler draws it."""

    def __init__(self, seed: int):
        self.seed = seed

    def generate_noise(self, latent: dict[str, Any]) -> Tensor:
        return comfy.sample.prepare_noise(latent["samples"], self.seed, latent.get("batch_index"))


#: Of the nodes with KSampler's inputs. The last one, so that workflows that were saved without it keep their values.
DENOISE = io.Float.Input(
    "denoise",
    default=1.0,
    min=0.01,
    max=1.0,
    step=0.01,
    optional=True,
    tooltip="As in KSampler: below 1 the tree grows from latent_image with some noise, and its leaves are variations of that "
    "picture.",
)


def simple_guider(
    model: Any, positive: Any, negative: Any, steps: int, cfg: float, scheduler: str, denoise: float
) -> tuple[Any, Tensor]:
    """A GUIDER and SIGMAS `[steps + 1]` from KSampler's inputs. With a denoise below 1 these are the last of more steps."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    # KSampler takes 1 from .9999 on.
    whole = int(steps / denoise) if denoise <= 0.9999 else steps
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, whole)
    return guider, sigmas[-(steps + 1) :].cpu()


class TreeSamplerNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TMPO_TreeSampler",
            display_name="Tree Sampler",
            category=CATEGORY,
            **aliases("variations", "seed explorer", "branching sampler", "KSampler tree"),
            description="Like KSampler, but samples a whole tree of pictures. Branches share all steps before they part.",
            inputs=[
                io.Model.Input("model", tooltip="A flow-matching model, such as FLUX, SD3.5, Qwen-Image or Z-Image."),
                io.Conditioning.Input("positive", tooltip="The prompt."),
                io.Conditioning.Input("negative", tooltip="What to avoid. It has no effect at cfg 1."),
                io.Latent.Input(
                    "latent_image", tooltip="Sets the size of the pictures. A batch gives a tree for each of its latents."
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True,
                    tooltip="The seed of all noise. The same seed gives the same tree.",
                ),
                io.Int.Input("steps", default=10, min=1, max=MOST_STEPS, tooltip="Denoising steps."),
                io.Float.Input(
                    "cfg", default=1.0, min=0.0, max=30.0, step=0.1,
                    tooltip="Classifier-free guidance: 4 to 5 for SD3.5, Qwen-Image, Z-Image and FLUX.2 [klein] base, "
                    "1 for FLUX and for models distilled to a few steps.",
                ),
                io.Combo.Input(
                    "scheduler", options=comfy.samplers.SCHEDULER_NAMES, default="normal",
                    tooltip="Sets the noise levels. normal equals diffusers' for SD3, simple diffusers' for FLUX and Z-Image. "
                    "For FLUX.2 take Flux2Scheduler and Tree Sampler (advanced).",
                ),
                *_tree_inputs(),
                DENOISE,
            ],
            outputs=[
                io.Latent.Output(display_name="leaves", tooltip="All leaves as a batch, in the order of the tree."),
                TreeSocket.Output(display_name="tree", tooltip="For Tree View, Boltzmann Weights, Score Images."),
            ],
            hidden=[io.Hidden.extra_pnginfo],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, branch_steps=None, steps=None, kernel=None, eta=None, branching=None) -> bool | str:
        return check_steps(branch_steps, steps, kernel, eta, branching)

    @classmethod
    def execute(
        cls, model, positive, negative, latent_image, seed, steps, cfg, scheduler, branch_steps, branching, kernel, eta,
        max_batch, solver="euler", denoise=1.0,
    ) -> io.NodeOutput:  # fmt: skip
        guider, sigmas = simple_guider(model, positive, negative, steps, cfg, scheduler, denoise)
        sampler = new_sampler(branch_steps, branching, kernel, eta, max_batch, solver)
        leaves, tree = sample_tree(guider, Seeded(seed), sigmas, latent_image, sampler, workflow_id(cls))
        tree.denoise = denoise
        return io.NodeOutput(leaves, tree)


class TreeSamplerObject(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TMPO_TreeSamplerSelect",
            display_name="Tree Sampler (SAMPLER)",
            category=CATEGORY,
            **aliases("variations", "tree SAMPLER"),
            description="The tree sampler as a SAMPLER, for nodes such as SamplerCustomAdvanced. Their output batch has all "
            "leaves.",
            inputs=_tree_inputs(),
            outputs=[io.Sampler.Output(display_name="sampler", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def validate_inputs(cls, branch_steps=None, kernel=None, eta=None, branching=None) -> bool | str:
        return check_steps(branch_steps, None, kernel, eta, branching)

    @classmethod
    def execute(cls, branch_steps, branching, kernel, eta, max_batch, solver="euler") -> io.NodeOutput:
        return io.NodeOutput(new_sampler(branch_steps, branching, kernel, eta, max_batch, solver))


class BranchScheduleNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TMPO_BranchSchedule",
            display_name="Branch Schedule",
            category=CATEGORY,
            **aliases("branch steps"),
            description="Draws the branch steps that training would draw at a given point of its curriculum.",
            inputs=[
                io.Int.Input("steps", default=6, min=2, max=200, tooltip="Denoising steps."),
                io.String.Input("early", default="1, 2, 3", tooltip="Mean branch steps at the beginning of training."),
                io.String.Input("late", default="1, 3, 5", tooltip="Mean branch steps at the end of training."),
                io.Float.Input(
                    "progress", default=0.0, min=0.0, max=1.0, step=0.01,
                    tooltip="The point of training, from 0 (beginning) to 1 (end).",
                ),
                io.Float.Input(
                    "kappa", **ADVANCED, default=6.0, min=0.1, max=1000.0, step=0.1,
                    tooltip="How close the steps are to the means. 2 with a mean in the middle is uniform.",
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=0x7FFFFFFF, control_after_generate=True, tooltip="The seed of the draw."
                ),
                io.Sigmas.Input(
                    "sigmas", optional=True, tooltip="Optional: they determine the last step that can carry noise."
                ),
            ],
            outputs=[io.String.Output(display_name="branch_steps", tooltip="For a tree sampler.")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, early=None, late=None) -> bool | str:
        return next((said for said in map(check_steps, (early, late)) if said is not True), True)

    @classmethod
    def execute(cls, steps, early, late, progress, kappa, seed, sigmas=None) -> io.NodeOutput:
        if sigmas is not None and len(sigmas) != steps + 1:
            raise ValueError(f"steps is {steps}, but these sigmas have {len(sigmas) - 1}")
        last = None if sigmas is None else flow.last_stochastic_step(sigmas)
        schedule = tree.BranchSchedule(steps, parse_steps(early), parse_steps(late), kappa, 1000, seed, last)
        return io.NodeOutput(", ".join(map(str, schedule.steps(round(1000 * progress)))))
