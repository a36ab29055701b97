"""The settings that all training methods share, their defaults and help texts. Importable without torch.

What a method adds stands in its own file, in a class `Settings` that derives from `TrainConfig`: the configuration of a run
is an instance of the chosen method's class. `presets.make_config` makes it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from . import paths
from .errors import one_line, quoted
from .paths import LocalPath, NamedPlace, Place

#: Which linear layers of the transformer's blocks get a LoRA. Modulation never does: ComfyUI orders its halves differently.
LoraTargets = Literal["paper", "attention", "text", "all-linear"]
#: How deterministic steps are taken: the names in `flow.Solver`, which would need torch.
Solver = Literal["euler", "ab2"]
#: Statistics of a sample that a reward can be made neutral to: the names in `nuisance.STATISTICS`, which would need torch.
Nuisance = Literal[
    "latent_norm", "latent_distance", "feature_distance", "brightness", "contrast", "saturation", "sharpness", "edge_density",
    "high_frequency", "colour_entropy", "file_size",
]  # fmt: skip

#: Upper bound of settings that count something and cost nothing by themselves, such as updates between two checkpoints.
COUNT = 10**9
#: The largest K. The rollout of one update keeps K latents and scores K pictures per prompt.
MOST_LEAVES = 10_000


def taken_out_wholly(neutral: Sequence[str], shares: Sequence[float]) -> tuple[str, ...]:
    """The statistics with a share of 1. shares: `neutral_share`, one for all statistics or one each."""
    return tuple(name for name, share in zip(neutral, itertools.cycle(shares), strict=False) if share == 1)


class TrainConfig(BaseModel):
    """Settings that all training methods share."""

    #: Further names for `--method`, and the settings that each of them fixes: ablations. Each begins with the name of the
    #: method's file and a dash.
    variants: ClassVar[dict[str, dict[str, Any]]] = {}
    #: Settings that mean something for this method alone: with another one, a value other than the default is an error.
    #: Any other setting of another method is ignored, so that a protocol's preset goes with every method.
    exclusive: ClassVar[tuple[str, ...]] = ()

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    # What is trained, on what, towards what
    model: Place = "demo"
    """`demo` (the bundled tiny model), a local diffusers folder, or a hub id owner/name."""
    transformer: LocalPath | None = None
    """A single safetensors file (ComfyUI's or the original names) in place of the model's own transformer."""
    reward: tuple[str, ...] = Field(("shapes",), min_length=1)
    """One or more scorers by name, or classes of your own as package.module:Class. Several are z-scored per prompt and
    averaged."""
    reward_weights: tuple[Annotated[float, Field(ge=-1e6, le=1e6)], ...] | None = None
    """One weight per reward, for a weighted sum. By default each is 1 divided by the number of rewards, which makes the sum
    a mean."""
    reward_models: tuple[NamedPlace, ...] = ()
    """NAME=PATH: where a scorer's weights are, in place of its hub repository; for `remote` the server's address."""
    pickscore_scale: Literal["raw", "flow"] = "raw"
    """`flow` divides PickScore by 26, as Flow-GRPO does. The z-score within a group undoes it; gardo has no z-score."""
    remote_hosts: tuple[str, ...] = ()
    """Hosts other than this machine that a `remote` reward may run on."""
    remote_timeout: float = Field(120, ge=0.01, le=86400)
    """Seconds within which a `remote` reward must answer."""
    reward_norm: Literal["zscore", "none"] = "zscore"
    """`zscore` normalises each reward within the K leaves of a prompt; `none` leaves a single reward raw, as
    the GRPO family always does."""
    method: str = "tmpo"
    """The training method: tmpo, one of its rivals on transitions (flow-grpo, mix-grpo, tree-grpo, gardo) or on noised leaves
    (awm, nft, crd, tmpo-leaf), or an ablation of TMPO (tmpo-beta-1, tmpo-step-balance, tmpo-no-tree, tmpo-fixed-branching)."""
    prompts: LocalPath | None = None
    """Training prompts: a .txt with one per line, or a .jsonl, .json, .csv or .tsv, which may have metadata; by default the
    list that comes with the reward."""
    eval_prompts: LocalPath | None = None
    """Held-out prompts for the report, in a file like that of --prompts; by default the list that comes with the reward."""

    # Length, place, repeatability
    updates: int = Field(500, ge=1, le=COUNT)
    """Number of updates (rollout, replay, optimiser step)."""
    output_dir: LocalPath | None = None
    """The run's folder; by default a new one, outputs/<preset>-<date>-<time>."""
    seed: int = Field(0, ge=0, lt=2**63)
    """The seed of all randomness: noise, branch steps, prompt order, LoRA initialisation."""

    # Rollout
    prompts_per_update: int = Field(1, ge=1, le=10_000)
    """Prompts per update and process; their gradients are averaged."""
    prompts_per_batch: int = Field(1, ge=1, le=10_000)
    """How many prompts are rolled out together in one batch; small models are faster with several."""
    rollout_steps: int = Field(6, ge=2, le=1000)
    """Denoising steps of a rollout, N."""
    solver: Solver = "euler"
    """How the rollout takes its deterministic steps: `euler` as in the paper, or `ab2`, which is of second order (two-step
    Adams-Bashforth) and needs no further network calls."""
    leaf_steps: int | None = Field(None, ge=1, le=1000)
    """At most this many denoising steps after the last stochastic one, where the tree is widest; by default as many as
    `rollout_steps` leaves. Fewer are larger. Chains without stochastic steps take all of them."""
    branching: int = Field(3, ge=2, le=MOST_LEAVES)
    """Children per branch point, B."""
    branch_early: tuple[int, ...] = (1, 2, 3)
    """Mean branch steps (1-based) at the first update; a branch at step 1 means independent seeds. Where a method does not
    branch at them, their number n still sets K = B^n."""
    guidance: float = Field(3.5, ge=0, le=1000)
    """Guidance scale, as the model's pipeline in diffusers takes it. Classifier-free guidance is off at 1 or less; that of
    Z-Image, which counts from 0, at 0."""
    resolution: tuple[Annotated[int, Field(le=8192)], Annotated[int, Field(le=8192)]] = (512, 512)
    """Height and width in pixels."""
    max_sequence_length: int = Field(256, ge=0, le=512)
    """Text tokens, as in the model's pipeline. A model without its long text encoder gets as many zero tokens instead: use 0
    for the demo model."""
    text_cache: LocalPath | None = None
    """Where text features are kept between runs, for models that free their text encoders; by default
    ~/.cache/tmpo_trainer/text."""
    max_batch: int | None = Field(None, ge=1, le=COUNT)
    """The largest number of latents in one network call of the rollout; by default there is no limit."""
    replay_batch: int | None = Field(None, ge=1, le=COUNT)
    """The largest number of latents in one network call of the replay; by default there is no limit. It is halved when the
    memory runs out."""
    gradient_checkpointing: bool = False
    """Recompute activations inside the transformer's blocks instead of keeping them: the replay needs much less memory and
    about a third more time."""
    split_guidance: bool = False
    """Evaluate classifier-free guidance in two network calls instead of one of twice the batch, which needs less memory."""
    decode_batch: int = Field(64, ge=1, le=COUNT)
    """The largest number of latents in one VAE decode."""

    # Objective
    neutral: tuple[Nuisance, ...] = ()
    """Statistics through which the reward must not be gained: within the K leaves of a prompt, what a least-squares fit on them
    explains is taken out of the reward. Of latents: latent_norm (squared norm), latent_distance (squared distance to the
    group's mean). Of features: feature_distance (mean cosine distance to the other leaves). Of pictures: brightness, contrast,
    saturation, sharpness, edge_density, high_frequency, colour_entropy, file_size. At most (K - 1) / 4 of them. A reward that
    is z-scored gets its standard deviation back afterwards."""
    neutral_share: Annotated[
        tuple[Annotated[float, Field(ge=0, le=1)], ...],
        BeforeValidator(lambda given: (given,) if isinstance(given, int | float) else given),
    ] = (1.0,)
    """How much of what the fit gives to a statistic of `neutral` is taken out of the reward, from 0 (nothing) to 1 (all):
    one value for all statistics, or one for each."""
    inner_updates: int = Field(1, ge=1, le=1000)
    """Optimiser steps per rollout."""
    data_weight: float = Field(0.0, ge=0, le=1e4)
    """Weight of an anchor on data, beside any method: the flow-matching loss on pictures that the pretrained model draws for
    the prompts of every update. What it draws stays likely; 0 for none."""
    data_folder: LocalPath | None = None
    """A folder of your own pictures in the place of those that the pretrained model draws: a picture's caption is the text file
    beside it (cat.jpg, cat.txt) or the prompt in its metadata. They are cropped to `resolution`."""
    data_images: int = Field(4, ge=1, le=1000)
    """Pictures per prompt of the anchor on data, each at the cost of `rollout_steps` forward passes and one replay."""

    # Optimiser
    learning_rate: float = Field(3e-5, ge=0, le=1)
    """AdamW's peak learning rate."""
    lr_min_ratio: float = Field(0.1, ge=0, le=1)
    """The learning rate at the end of the cosine schedule, as a share of the peak."""
    weight_decay: float = Field(1e-4, ge=0, le=10)
    """AdamW's weight decay."""
    adam_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """AdamW's betas."""
    max_grad_norm: float = Field(0.5, ge=1e-6, le=1e12)
    """The gradient norm is clipped to this."""
    ema_decay: float = Field(0.9, ge=0, lt=1)
    """Decay of the averaged (EMA) weights, which evaluation and export use."""
    ema_every: int = Field(8, ge=1, le=COUNT)
    """Updates between two steps of the average."""

    # LoRA
    lora_rank: int = Field(64, ge=1, le=4096)
    """Rank of the LoRA."""
    lora_targets: LoraTargets = "paper"
    """`paper`: attention and feed-forward layers, as in the paper. `attention`: attention only. `text`: only the layers of the
    text stream. `all-linear`: every linear layer of the blocks."""
    lora_alpha: float = Field(128, ge=1e-3, le=1e5)
    """The LoRA is scaled by alpha / rank; the export folds that into the weights."""
    init_lora: LocalPath | None = None
    """Start from this LoRA file (any format that diffusers loads) instead of from zero. KL, anchor and report still compare
    with the model without it."""

    # Numbers and pictures on the way
    eval_images: int = Field(8, ge=2, le=10_000)
    """Images per held-out prompt in the report."""
    eval_limit: int | None = Field(None, ge=1, le=COUNT)
    """Use only this many held-out prompts, from the start of the list."""
    features: Place = "efficientnet-lite0"
    """What cosine diversity is measured on: `efficientnet-lite0` (comes with the package), or a DINOv2 as a hub id or
    folder (the paper: facebook/dinov2-large)."""
    eval_steps: int = Field(28, ge=1, le=1000)
    """Denoising steps in the report and the sample grids."""
    eval_solver: Solver = "euler"
    """How the report and the sample grids take their steps, see `solver`."""
    eval_every: int = Field(0, ge=0, le=COUNT)
    """Updates between two evaluations on the held-out prompts, with averaged weights and the base beside them; 0 for none."""
    sample_every: int = Field(50, ge=0, le=COUNT)
    """Updates between two sample grids; 0 for none."""
    checkpoint_every: int = Field(50, ge=0, le=COUNT)
    """Updates between two checkpoints; 0 for none. One is always written at the end."""
    checkpoints_kept: int = Field(2, ge=1, le=COUNT)
    """How many checkpoints are kept; older ones are deleted."""
    report: bool = True
    """Evaluate base and trained model on held-out prompts at the end and write report.md."""

    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """A tracker that also gets figures and sample grids, through accelerate; its package must be installed."""

    # Machine
    device: str = "auto"
    """Where the model runs: auto, cpu, cuda or cuda:N."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the frozen weights; auto is bfloat16 on a GPU and float32 on a CPU. LoRA and latents are float32."""
    quantize: Literal["none", "nf4"] = "none"
    """`nf4` keeps the frozen transformer in four bits (bitsandbytes) on a GPU, in about a quarter of the memory."""
    attention: Literal["native", "flash", "sage"] = "native"
    """What computes FLUX's attention: torch, or the package flash-attn on a GPU in bfloat16. sage is refused, since it has no
    gradient."""
    offload_scorers: bool = False
    """Keep scorers' weights in the computer's memory while they do not score."""
    compile: bool = False
    """Compile the transformer's blocks with torch.compile: the first updates take minutes longer, the others less."""
    threads: int | None = Field(None, ge=1, le=1024)
    """Number of CPU threads that torch uses; by default torch chooses."""

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.reward_weights is not None and len(self.reward_weights) != len(self.reward):
            raise ValueError(
                f"reward_weights has {len(self.reward_weights)} values for {len(self.reward)} rewards: give one each"
            )
        if len(set(self.reward)) != len(self.reward):
            raise ValueError(f"reward {one_line(' '.join(self.reward), 80)} names one twice")
        for entry in self.reward_models:
            name, _, path = entry.partition("=")
            if not path:
                raise ValueError(f"reward_models {one_line(entry, 80)}: write NAME=PATH")
            if name not in (*self.reward, *self.extra_rewards):
                shown, known = one_line(name, 80), one_line(" ".join(self.reward), 80)
                raise ValueError(f"reward_models {one_line(entry, 80)}: {shown} is none of the rewards {known}")
        if self.attention == "sage":
            raise ValueError(
                "attention sage has no gradient, and the replay must compute what the rollout did: use native or flash"
            )
        if self.reward_norm == "none" and len(self.reward) > 1:
            raise ValueError("reward_norm none is for a single reward: several need zscore")
        self.check_steps("branch_early", self.branch_early, self.branches_there)
        if self.leaves > MOST_LEAVES:
            raise ValueError(
                f"branching {self.branching} at {len(self.branch_early)} steps: more than {MOST_LEAVES} pictures per prompt"
            )
        if self.data_folder is not None and not self.data_weight:
            raise ValueError(f"data_folder {self.data_folder} without data_weight: give the weight of the anchor too")
        if len(set(self.neutral)) != len(self.neutral):
            raise ValueError(f"neutral {' '.join(self.neutral)} names one twice")
        # Without statistics, as with `--neutral none`, the preset's shares do not matter.
        if self.neutral and len(self.neutral_share) not in (1, len(self.neutral)):
            raise ValueError(
                f"neutral_share has {len(self.neutral_share)} values for {len(self.neutral)} statistics: give one, or one each"
            )
        if len(self.neutral) > (most := (self.leaves - 1) // 4):
            raise ValueError(
                f"neutral names {len(self.neutral)} statistics, and {self.leaves} pictures per prompt allow {most}, a quarter "
                "of K - 1: name fewer, or raise branching"
            )
        together = min(self.prompts_per_batch, self.prompts_per_update)
        for name in ("max_batch", "replay_batch"):
            if (getattr(self, name) or together) < together:
                raise ValueError(f"{name} {getattr(self, name)} cannot hold one latent of each of {together} prompts")
        return self

    @property
    def branches_there(self) -> bool:
        """Whether the rollout branches at `branch_early`. Other methods only take K from its length."""
        return False

    def check_steps(self, name: str, steps: tuple[int, ...], there: bool = True) -> None:
        """Raises ValueError unless a setting's branch steps increase and, if the rollout branches there, fit into it and leave
        something to train."""
        if not steps or list(steps) != sorted(set(steps)) or steps[0] < 1:
            raise ValueError(f"{name} {quoted(list(steps))} must be strictly increasing steps, counted from 1")
        if not there:
            return
        if steps[-1] >= self.rollout_steps:
            raise ValueError(f"{name} {quoted(list(steps))} must stay below rollout_steps {self.rollout_steps}")
        if steps[-1] == 1:
            raise ValueError(f"{name} [1] leaves nothing to train: step 1 only draws seeds, add a later step")

    @property
    def leaves(self) -> int:
        """K, pictures per prompt and update."""
        return self.branching ** len(self.branch_early)

    @property
    def extra_rewards(self) -> tuple[str, ...]:
        """Scorers that the method needs beside the rewards."""
        return ()

    @property
    def taken_out(self) -> tuple[str, ...]:
        """The `neutral` statistics that are taken out of the reward wholly."""
        return taken_out_wholly(self.neutral, self.neutral_share)

    @property
    def needs_features(self) -> bool:
        """Whether the method, or the reward's neutral statistics, look at the image features of every rollout."""
        return "feature_distance" in self.neutral

    @property
    def combining(self) -> Literal["zscore", "none"]:
        """How the method wants rewards combined, see `rewards.combine`."""
        return self.reward_norm


def absolute(config: TrainConfig) -> TrainConfig:
    """The same settings with absolute paths, so that they mean the same from any folder. Names, hub ids and addresses stay."""
    changes: dict[str, Any] = {name: value.absolute() for name, value in config if isinstance(value, Path)}
    changes |= {name: paths.absolute(getattr(config, name)) for name in ("model", "features")}
    changes["reward_models"] = tuple(paths.in_entry(paths.absolute, entry) for entry in config.reward_models)
    return config.model_copy(update=changes)


def to_yaml(config: TrainConfig) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
