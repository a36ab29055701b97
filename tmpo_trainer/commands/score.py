"""`score`: scores and diversity of picture files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..settings.config import TrainConfig
from ..settings.errors import ConfigError
from ..settings.presets import make_config
from .flags import Parser, add_scorer_flags, command_parser, exit_code, hush, path_flag


def make_parser() -> Parser:
    parser = command_parser(
        "score",
        "Scores picture files and prints a table. A picture's prompt is --prompt, its line of --prompts, the .txt beside "
        "it, or what ComfyUI (PNG) or A1111 wrote into it.",
    )
    parser.add_argument("paths", nargs="+", type=path_flag, metavar="PATH", help="pictures or folders of pictures")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", help="the prompt of all pictures")
    prompts.add_argument(
        "--prompts",
        type=path_flag,
        metavar="FILE",
        help="a prompt file with a prompt per picture, in order of names",
    )
    add_scorer_flags(parser, ())
    parser.add_argument("--remote-hosts", nargs="+", default=[], metavar="HOST", help="hosts that `remote` may use")
    parser.add_argument("--remote-timeout", type=float, default=120, help="seconds to wait for it [120]")
    parser.add_argument("--diversity", action="store_true", help="measure how much the pictures of a prompt differ")
    parser.add_argument(
        "--features",
        default=TrainConfig.model_fields["features"].default,
        help="feature extractor for diversity of pictures [%(default)s]",
    )
    parser.add_argument(
        "--vae",
        metavar="MODEL",
        help="also measure diversity of latents (LGMD), encoded by this model's VAE: `demo`, a diffusers folder or a hub id",
    )
    parser.add_argument("--output", type=path_flag, metavar="FILE", help="also write a .csv or .json")
    return parser


def check(namespace: argparse.Namespace) -> None:
    """Raises ConfigError for flags that do not go together."""
    if not namespace.reward and not namespace.diversity:
        raise ConfigError("score measures nothing: give --reward NAME or --diversity")
    if namespace.vae and not namespace.diversity:
        raise ConfigError("--vae is for --diversity: give both")
    if namespace.output and namespace.output.suffix not in (".csv", ".json"):
        raise ConfigError(f"--output {namespace.output}: must end in .csv or .json")
    if namespace.output and not namespace.output.parent.is_dir():
        raise ConfigError(f"--output {namespace.output}: folder {namespace.output.parent} does not exist: create it")


def command(arguments: Sequence[str]) -> int:
    """Runs the command. Returns the exit code."""
    namespace = make_parser().parse_args(arguments)
    check(namespace)
    settings = {
        "reward_models": namespace.reward_models,
        "remote_hosts": namespace.remote_hosts,
        "remote_timeout": namespace.remote_timeout,
    }
    rewards = {"reward": namespace.reward} if namespace.reward else {}
    config = make_config([("flags", {**settings, **rewards, "features": namespace.features})])
    hush()
    return _score(namespace, config)


def _score(namespace: argparse.Namespace, config: TrainConfig) -> int:
    import numpy as np

    from ..diversity import MEASURES
    from ..evaluation import picture_files as scoring
    from ..evaluation.latents import LatentEncoder
    from ..prompts.lists import PromptList, read_prompts
    from . import loading

    device = loading.choose_device(namespace.device)
    listed = read_prompts(namespace.prompts) if namespace.prompts else None
    pictures = scoring.open_images(
        scoring.find_images(namespace.paths),
        namespace.prompt,
        listed,
        # Diversity alone needs no prompts: without them, all pictures are one group.
        together=None if namespace.reward else "all pictures",
    )
    metadata = listed.metadata if listed else {}
    if namespace.reward:
        loading.check_rewards(config)
        shown = [picture.prompt for picture in pictures]
        listing = PromptList(str(namespace.prompts or "prompts"), shown, metadata)
        loading.check_prompts(namespace.reward, listing, loading.reward_paths(config))
    if namespace.diversity and not scoring.by_prompt(pictures):
        raise ConfigError("--diversity: no two pictures have the same prompt, so there is nothing to compare")
    scorers = loading.evaluation_scorers(loading.scorers(config, device)) if namespace.reward else []
    features = loading.features(config, device) if namespace.diversity else None
    encoder = LatentEncoder(namespace.vae, device) if namespace.vae else None
    if encoder is not None:
        scoring.check_encodable(pictures, encoder)
    elif namespace.diversity:
        left_out = ", ".join(name for name, measure in MEASURES.items() if measure.on == "latents")
        print(f"tmpo_trainer: {left_out} is not measured, because it needs latents: give --vae MODEL", file=sys.stderr)

    def work() -> int:
        scores = {name: np.full(len(pictures), np.nan, np.float32) for name, _ in scorers}
        groups, distances = {}, {}
        try:
            if scorers:
                scoring.score_images(pictures, metadata, scorers, scores)
            if features is not None:
                groups, distances = scoring.measure_diversity(pictures, features, encoder)
        except BaseException:
            # What was scored before a failure or Ctrl-C is kept. The first error is the one to report.
            done = [i for i in range(len(pictures)) if all(np.isfinite(values[i]) for values in scores.values())]
            if scorers and done:
                print(f"tmpo_trainer: {len(done)} of {len(pictures)} pictures were scored", file=sys.stderr)
                output = namespace.output
                if output and len(done) < len(pictures):
                    # A file of all pictures may be there from before.
                    output = output.with_stem(f"{output.stem}.partial")
                with suppress(OSError):
                    own = {name: values[done] for name, values in scores.items()}
                    show(output, [pictures[i] for i in done], own, {}, {})
            raise
        show(namespace.output, pictures, scores, groups, distances)
        return 0

    def show(
        output: Path | None,
        pictures: Sequence[scoring.Picture],
        scores: dict[str, np.ndarray],
        groups: dict[str, Any],
        distances: dict[str, Any],
    ) -> None:
        # If one of the two fails, as on a full disk or into a closed pipe, the other still holds the scores.
        try:
            if output:
                scoring.write(output, pictures, scores, groups)
        finally:
            print(scoring.text_table(pictures, scores, groups))
            if scores and distances:
                print(f"\n{scoring.limit_table(pictures, scores, distances)}")
        if output:
            print(f"written: {output}", file=sys.stderr)

    return exit_code(work)
