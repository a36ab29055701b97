"""Every setting of a training run, its default and its help text. Importable without torch.

Precedence: flags > `--config run.yaml` > `--preset NAME` > the defaults below. Flags, YAML and presets go through the same
validation; an unknown key or a value of the wrong kind is an error that names it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

#: The paper's method, its rivals and its ablations; what each does is in `methods.py`.
Method = Literal[
    "tmpo", "flow-grpo", "mix-grpo", "tree-grpo", "gardo",
    "tmpo-beta-1", "tmpo-step-balance", "tmpo-no-tree", "tmpo-fixed-branching",
]  # fmt: skip

#: Which linear layers of the transformer's blocks get a LoRA. Modulation never: ComfyUI orders its halves differently.
LoraTargets = Literal["paper", "attention", "text", "all-linear"]


class TrainConfig(BaseModel):
    """Settings of `python -m tmpo_trainer`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    # What is trained, on what, towards what
    model: str = "demo"
    """`demo` (the bundled tiny model), a local diffusers folder, or a hub id owner/name."""
    transformer: Path | None = None
    """A single safetensors file (ComfyUI's or the original names) in place of the model's own transformer."""
    reward: tuple[str, ...] = Field(("shapes",), min_length=1)
    """One or more scorers; several are z-scored per prompt and added."""
    reward_weights: tuple[float, ...] | None = None
    """One weight per reward; all 1 by default."""
    reward_models: tuple[str, ...] = ()
    """NAME=PATH: where a scorer's weights are, in place of its hub repository; for `remote` the server's address."""
    pickscore_scale: Literal["raw", "flow"] = "raw"
    """`flow` divides PickScore by 26, as Flow-GRPO does. A z-score within the group undoes it; gardo has none."""
    remote_hosts: tuple[str, ...] = ()
    """Hosts beside this machine that a `remote` reward may be on."""
    remote_timeout: float = Field(120, gt=0)
    """Seconds within which a `remote` reward has to answer."""
    reward_norm: Literal["zscore", "none"] = "zscore"
    """`zscore` normalises each reward within the K leaves of a prompt; `none`, or method gardo, leaves a single
    reward raw."""
    method: Method = "tmpo"
    """The training method: TMPO, a rival (flow-grpo, mix-grpo, tree-grpo, gardo), or an ablation of TMPO."""
    prompts: Path | None = None
    """Training prompts: one per line, or .jsonl with metadata; by default the list that comes with the reward."""
    eval_prompts: Path | None = None
    """Held-out prompts for the report, in such a file; by default the list that comes with the reward."""

    # Length, place, repeatability
    updates: int = Field(500, ge=1)
    """Number of updates (rollout, replay, optimiser step)."""
    output_dir: Path | None = None
    """The run's folder; by default a new one, outputs/<preset>-<date>-<time>."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of everything: noise, branch steps, prompt order, LoRA initialisation."""

    # Rollout
    prompts_per_update: int = Field(1, ge=1)
    """Prompts per update and process; their gradients are averaged."""
    prompts_per_batch: int = Field(1, ge=1)
    """How many of them are rolled out together in one batch (small models are faster that way)."""
    rollout_steps: int = Field(6, ge=2)
    """Denoising steps of a rollout, N."""
    branching: int = Field(3, ge=2)
    """Children per branch point, B."""
    branch_early: tuple[int, ...] = (1, 2, 3)
    """Mean branch steps (1-based) at the first update; a branch at step 1 means independent seeds."""
    branch_late: tuple[int, ...] = (1, 3, 5)
    """Mean branch steps at the last update."""
    kappa: float = Field(6.0, gt=0)
    """Concentration of the branch steps around their means; 2 with a mean in the middle is uniform."""
    window: int = Field(4, ge=1)
    """mix-grpo: how many neighbouring steps carry noise."""
    window_every: int = Field(25, ge=1)
    """mix-grpo: updates after which the window moves on by one step."""
    kernel: Literal["cps", "flow_sde", "dance"] = "cps"
    """Transition kernel of the stochastic steps."""
    eta: float = Field(0.7, gt=0)
    """Noise level of the stochastic steps; at most 1 for cps."""
    guidance: float = Field(3.5, ge=0)
    """Guidance scale. For models with classifier-free guidance 1 or less switches it off."""
    resolution: tuple[int, int] = (512, 512)
    """Height and width in pixels."""
    max_sequence_length: int = Field(256, ge=0, le=512)
    """T5 tokens. Without T5, diffusers appends as many zero tokens: 0 for the demo model."""
    text_cache: Path | None = None
    """Where the text features of models with T5 are kept between runs; by default ~/.cache/tmpo_trainer/text."""
    max_batch: int | None = Field(None, ge=1)
    """Most latents in one network call of the rollout; by default no limit."""
    replay_batch: int | None = Field(None, ge=1)
    """Most latents in one network call of the replay, by default no limit. Halved where that does not fit into memory."""
    gradient_checkpointing: bool = False
    """Keep no activations inside the transformer's blocks: much less memory in the replay, about a third more time."""
    split_guidance: bool = False
    """Classifier-free guidance in two network calls instead of one of twice the batch: less memory at once."""
    decode_batch: int = Field(64, ge=1)
    """Most latents in one VAE decode."""

    # Objective
    beta_start: float = Field(0.8, gt=0)
    """Inverse temperature of the Boltzmann target at the first update."""
    beta_end: float = Field(2.0, gt=0)
    """Inverse temperature after the warm-up."""
    beta_warmup: int = Field(150, ge=0)
    """Updates over which beta rises linearly."""
    clip: float = Field(0.2, gt=0)
    """PPO's epsilon."""
    baseline: Literal["none", "group", "siblings"] = "none"
    """What is subtracted from the advantage: nothing (the paper), the group's mean, or the siblings' mean per edge."""
    anchor: Literal["none", "ref"] = "none"
    """`ref` matches the pretrained model tilted by the reward, at the cost of one reference forward per parent."""
    anchor_weight: float = Field(1.0, gt=0)
    """lambda: the anchor asks for the pretrained model tilted by exp(beta R / lambda); on the scale of kl_weight."""
    logp_reduce: Literal["mean", "sum"] = "mean"
    """How log-probabilities are reduced over latent dimensions (paper: mean)."""
    inner_updates: int = Field(1, ge=1)
    """Optimiser updates per rollout."""
    kl_weight: float = Field(0.0, ge=0)
    """Weight of the KL penalty to the pretrained model; with the GRPO family the KL of the paper's rivals, see methods.py."""
    auxiliary: tuple[str, ...] = ()
    """gardo: scorers beside the reward; where they rank a picture far below the reward, it is held by the KL penalty."""

    # Optimiser
    learning_rate: float = Field(3e-5, ge=0)
    """AdamW's peak learning rate."""
    lr_min_ratio: float = Field(0.1, ge=0, le=1)
    """Where the cosine ends, as a share of the peak."""
    weight_decay: float = Field(1e-4, ge=0)
    """AdamW's weight decay."""
    adam_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """AdamW's betas."""
    max_grad_norm: float = Field(0.5, gt=0)
    """Gradient clipping."""
    ema_decay: float = Field(0.9, ge=0, lt=1)
    """Decay of the averaged weights, which evaluation and export use."""
    ema_every: int = Field(8, ge=1)
    """Updates between two averages."""

    # LoRA
    lora_rank: int = Field(64, ge=1)
    """Rank."""
    lora_targets: LoraTargets = "paper"
    """`paper`: attention and feed-forward of the joint blocks, attention of FLUX's single blocks. `attention`: only that.
    `text`: only the joint blocks' stream of text tokens. `all-linear`: also the rest of the single blocks."""
    lora_alpha: float = Field(128, gt=0)
    """Scale is alpha / rank; the export folds it into the weights."""
    init_lora: Path | None = None
    """Start from this LoRA file (diffusers' names) instead of from zero. KL, anchor and report still compare with the
    model without it."""

    # Numbers and pictures on the way
    eval_images: int = Field(8, ge=2)
    """Images per held-out prompt in the report."""
    eval_limit: int | None = Field(None, ge=1)
    """Use only the first so many held-out prompts."""
    features: str = "efficientnet-lite0"
    """What cosine diversity is measured on: `efficientnet-lite0` (comes with the package), or a DINOv2 as a hub id or
    folder (the paper: facebook/dinov2-large)."""
    eval_steps: int = Field(28, ge=1)
    """Denoising steps in the report and the sample grids."""
    eval_every: int = Field(0, ge=0)
    """Updates between two evaluations on the held-out prompts, with averaged weights and the base beside them; 0 for none."""
    sample_every: int = Field(50, ge=0)
    """Updates between two sample grids; 0 for none."""
    checkpoint_every: int = Field(50, ge=0)
    """Updates between two checkpoints; one is always written at the end. 0 for only that one."""
    checkpoints_kept: int = Field(2, ge=1)
    """Older checkpoints are deleted."""
    report: bool = True
    """Evaluate base and trained model on held-out prompts at the end and write report.md."""

    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Also send figures and sample grids to a tracker, through accelerate; its package must be installed."""

    # Machine
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the frozen weights; auto is bfloat16 on a GPU and float32 on a CPU. LoRA and latents are float32."""
    quantize: Literal["none", "nf4"] = "none"
    """`nf4`: the frozen transformer in four bits (bitsandbytes), a quarter of the memory, on a GPU."""
    offload_scorers: bool = False
    """Keep scorers' weights in the computer's memory while they do not score."""
    compile: bool = False
    """torch.compile of the transformer's blocks: the first updates take minutes longer, the others less."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of torch; by default torch's own choice."""

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.reward_weights is not None and len(self.reward_weights) != len(self.reward):
            raise ValueError(
                f"reward_weights has {len(self.reward_weights)} values for {len(self.reward)} rewards: give one each"
            )
        if len(set(self.reward)) != len(self.reward):
            raise ValueError(f"reward {' '.join(self.reward)} names one twice")
        for entry in self.reward_models:
            name, _, path = entry.partition("=")
            if not path:
                raise ValueError(f"reward_models {entry}: write NAME=PATH")
            if name not in (*self.reward, *self.auxiliary):
                raise ValueError(f"reward_models {entry}: {name} is none of the rewards {' '.join(self.reward)}")
        if self.reward_norm == "none" and len(self.reward) > 1:
            raise ValueError("reward_norm none is for a single reward: several need zscore")
        if self.kernel == "cps" and self.eta > 1:
            raise ValueError(f"eta {self.eta} is too large for kernel cps: at most 1")
        for name in ("branch_early", "branch_late"):
            steps = getattr(self, name)
            if not steps or list(steps) != sorted(set(steps)) or steps[0] < 1:
                raise ValueError(f"{name} {list(steps)} must be strictly increasing steps, counted from 1")
            if steps[-1] >= self.rollout_steps:
                raise ValueError(f"{name} {list(steps)} must stay below rollout_steps {self.rollout_steps}")
            if steps[-1] == 1:
                raise ValueError(f"{name} [1] leaves nothing to train: step 1 only draws seeds, add a later step")
        if len(self.branch_early) != len(self.branch_late):
            raise ValueError("branch_early and branch_late differ in number")
        if self.method != "tmpo" and self.anchor != "none":
            raise ValueError(f"anchor {self.anchor} belongs to method tmpo, not to {self.method}")
        if self.baseline != "none" and not self.method.startswith("tmpo"):
            raise ValueError(f"baseline {self.baseline} belongs to TMPO; {self.method} has its own: leave it at none")
        if self.baseline == "siblings" and self.method == "tmpo-no-tree":
            raise ValueError("baseline siblings with method tmpo-no-tree: chains have no siblings, use none or group")
        if self.baseline == "group" and self.method == "tmpo-step-balance":
            raise ValueError(
                "baseline group with method tmpo-step-balance: it has no advantage per path, use none or siblings"
            )
        if self.method == "gardo" and not (self.auxiliary and self.kl_weight):
            raise ValueError(
                "method gardo needs auxiliary scorers and a kl_weight above 0: its gate decides where that acts"
            )
        if len(set(self.auxiliary)) != len(self.auxiliary) or self.auxiliary == self.reward:
            raise ValueError(f"auxiliary {' '.join(self.auxiliary)}: name each once, and others than the reward alone")
        if self.auxiliary and self.method != "gardo":
            raise ValueError(f"auxiliary {' '.join(self.auxiliary)} belongs to method gardo, not to {self.method}")
        together = min(self.prompts_per_batch, self.prompts_per_update)
        for name in ("max_batch", "replay_batch"):
            if (getattr(self, name) or together) < together:
                raise ValueError(f"{name} {getattr(self, name)} cannot hold one latent of each of {together} prompts")
        return self

    @property
    def leaves(self) -> int:
        """K, pictures per prompt and update."""
        return self.branching ** len(self.branch_early)

    def beta(self, update: int) -> float:
        """Inverse temperature of an update (0-based)."""
        if self.method == "tmpo-beta-1":
            return 1.0
        progress = min(update / self.beta_warmup, 1.0) if self.beta_warmup else 1.0
        return self.beta_start + (self.beta_end - self.beta_start) * progress


def to_yaml(config: TrainConfig) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
