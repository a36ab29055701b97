"""The commands beside training: evaluate, compare, score, serve, fetch, prompts, inspect, toy, launch."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import cli
from .config import TrainConfig, make_config, preset_names, read_yaml
from .errors import ConfigError

#: Flags of `evaluate` and the settings they are. What only training knows is none of them.
EVALUATION = {
    "model": "model", "transformer": "transformer", "reward": "reward", "reward-models": "reward_models",
    "remote-hosts": "remote_hosts", "remote-timeout": "remote_timeout", "prompts": "eval_prompts", "limit": "eval_limit",
    "images": "eval_images", "steps": "eval_steps", "features": "features", "guidance": "guidance",
    "resolution": "resolution", "max-sequence-length": "max_sequence_length", "text-cache": "text_cache", "seed": "seed",
    "output-dir": "output_dir", "max-batch": "max_batch", "split-guidance": "split_guidance",
    "decode-batch": "decode_batch", "device": "device", "dtype": "dtype", "quantize": "quantize",
    "offload-scorers": "offload_scorers", "threads": "threads",
}  # fmt: skip
#: Pictures per prompt where neither a run nor a preset says more.
IMAGES = 10
#: Measured beside a run's own rewards, as in the paper's tables, unless the model is the demo's.
PREFERENCE = ("hpsv2", "imagereward", "pickscore")
#: Compared unless others are named.
RIVALS = ("tmpo", "flow-grpo", "mix-grpo", "tree-grpo", "gardo")


def _parser(name: str, description: str, epilog: str | None = None) -> cli.Parser:
    return cli.Parser(prog=f"python -m tmpo_trainer {name}", description=description, epilog=epilog, allow_abbrev=False)


def _add_scorer_flags(parser: argparse.ArgumentParser, default: Sequence[str] | None = None) -> None:
    more: dict[str, Any] = {"required": True} if default is None else {"default": list(default)}
    parser.add_argument("--reward", nargs="+", metavar="NAME", help="one or more scorers", **more)
    parser.add_argument(
        "--reward-models", nargs="+", default=[], metavar="NAME=PATH", help="where a scorer's weights are"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")


def _told(work: Callable[[], int]) -> int:
    """What fails on the way is one line and exit code 1; what a user can mend stays a ConfigError."""
    try:
        return work()
    except ConfigError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        print(f"tmpo_trainer: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


def evaluate(arguments: Sequence[str]) -> int:
    parser = _parser(
        "evaluate",
        "Base model and LoRA on held-out prompts, the same noise for both: scores and diversity in the columns of the "
        "paper's Table 1, with 95% bootstrap intervals over prompts; markdown, json and pictures.",
        f"Settings not given come from the run's config.yaml, else from the reward's preset ({', '.join(preset_names())}).",
    )
    parser.add_argument("lora", nargs="?", type=Path, help="a run's folder or a LoRA file; without, the base alone")
    parser.add_argument(
        "--preference-prompts",
        type=Path,
        metavar="FILE",
        help="other prompts for all rewards but the first and for diversity (the paper: DrawBench)",
    )
    cli.add_settings(parser, EVALUATION)
    namespace, unknown = parser.parse_known_args(arguments)
    cli.refuse_unknown(unknown, [f"--{name}" for name in (*EVALUATION, "preference-prompts")])
    flags = cli.given(namespace, EVALUATION.values())
    saved = namespace.lora / "config.yaml" if namespace.lora else None
    layers: list[tuple[str, dict[str, Any]]] = [("defaults", {"eval_images": IMAGES})]
    if saved is not None and saved.is_file():
        settings = read_yaml(saved)
        # Where it was trained is not where it is evaluated, and a run's folder keeps its own files.
        kept = {key: value for key, value in settings.items() if key in EVALUATION.values() and key != "output_dir"}
        if "reward" not in flags and kept.get("model", "demo") != "demo":
            own = [name for name in kept.get("reward", ()) if name not in PREFERENCE]
            kept["reward"] = [*own, *PREFERENCE]
        layers.append((str(saved), kept))
    else:
        measured = {} if flags.get("model", "demo") == "demo" else {"reward": list(PREFERENCE)}
        layers += [*cli.preset_layers(measured | flags), ("measures", measured)]
    config = cli.make_config([*layers, ("flags", flags)])
    if namespace.preference_prompts and len(config.reward) < 2:
        raise ConfigError("--preference-prompts is for the rewards after the first: give two or more")
    cli.hush()
    from . import table

    return _told(lambda: table.run(config, namespace.lora, namespace.preference_prompts))


def score(arguments: Sequence[str]) -> int:
    parser = _parser(
        "score",
        "Scores picture files and prints a table. A picture's prompt is --prompt, its line of --prompts, the .txt beside "
        "it, or what ComfyUI (PNG) or A1111 wrote into it.",
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="pictures or folders of pictures")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", help="of all pictures")
    prompts.add_argument(
        "--prompts", type=Path, metavar="FILE", help="one per picture, in order of names; .txt or .jsonl"
    )
    _add_scorer_flags(parser, ())
    parser.add_argument("--remote-hosts", nargs="+", default=[], metavar="HOST", help="that `remote` may be on")
    parser.add_argument("--remote-timeout", type=float, default=120, help="seconds for its answer [120]")
    parser.add_argument("--diversity", action="store_true", help="how much the pictures of a prompt differ")
    parser.add_argument(
        "--features", default=TrainConfig.model_fields["features"].default, help="what diversity is measured on"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write a .csv or .json")
    namespace = parser.parse_args(arguments)
    if not namespace.reward and not namespace.diversity:
        raise ConfigError("score measures nothing: give --reward NAME or --diversity")
    if namespace.output and namespace.output.suffix not in (".csv", ".json"):
        raise ConfigError(f"--output {namespace.output}: end it in .csv or .json")
    if namespace.output and not namespace.output.parent.is_dir():
        raise ConfigError(f"--output {namespace.output}: folder {namespace.output.parent} does not exist")
    settings = {
        "reward_models": namespace.reward_models,
        "remote_hosts": namespace.remote_hosts,
        "remote_timeout": namespace.remote_timeout,
    }
    rewards = {"reward": namespace.reward} if namespace.reward else {}
    config = cli.make_config([("flags", {**settings, **rewards, "features": namespace.features})])
    cli.hush()
    from . import loading
    from . import score as scoring
    from .prompts import PromptList, read_prompts

    device = loading.choose_device(namespace.device)
    listed = read_prompts(namespace.prompts) if namespace.prompts else None
    # Diversity alone needs no prompts: all pictures are one group.
    prompt = namespace.prompt or ("" if namespace.reward or listed else "all pictures")
    pictures = scoring.open_images(scoring.find_images(namespace.paths), prompt or None, listed)
    metadata = listed.metadata if listed else {}
    if namespace.reward:
        loading.check_rewards(config)
        shown = [picture.prompt for picture in pictures]
        loading.check_prompts(namespace.reward, PromptList(str(namespace.prompts or "prompts"), shown, metadata))
    scorers = loading.evaluation_scorers(loading.scorers(config, device)) if namespace.reward else []
    features = loading.features(config, device) if namespace.diversity else None
    texts = [picture.prompt for picture in pictures]
    if features is not None and len(set(texts)) == len(texts):
        raise ConfigError("--diversity: no two pictures have the same prompt, so there is nothing to compare")

    def work() -> int:
        scores, groups = scoring.score_images(pictures, metadata, scorers, features)
        print(scoring.table(pictures, scores, groups))
        if namespace.output:
            scoring.write(namespace.output, pictures, scores, groups)
            print(f"written: {namespace.output}", file=sys.stderr)
        return 0

    return _told(work)


def compare(arguments: Sequence[str]) -> int:
    parser = _parser(
        "compare",
        "Trains methods from the same base with the same prompts and budget, several seeds each, and measures all on the same "
        "held-out prompts: tables, Pareto pictures, curves, grids. After a kill the same command goes on.",
        "All other flags are those of training and hold for every arm: --preset, --reward, --eval-images, ... Without a budget "
        "every arm has the updates of its settings; --updates N gives all the same.",
    )
    arms = parser.add_mutually_exclusive_group()
    arms.add_argument(
        "--methods", nargs="+", default=list(RIVALS), metavar="NAME", help=f"by default {' '.join(RIVALS)}"
    )
    arms.add_argument(
        "--arms", type=Path, metavar="FILE", help="YAML, {name of an arm: {setting: value}}, instead of methods"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="of training, one run each [0]")
    budgets = parser.add_mutually_exclusive_group()
    budgets.add_argument("--evaluations", type=float, metavar="N", help="network evaluations of a run, per process")
    budgets.add_argument("--seconds", type=float, metavar="S", help="of training, by a trial run of each arm")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time [1]; use --threads beside it")
    parser.add_argument("--launch", choices=("ddp", "fsdp2"), help="every run over all GPUs of this machine")
    parser.add_argument(
        "--output-dir", type=Path, default=Path("outputs/compare"), metavar="DIR", help="[outputs/compare]"
    )
    namespace, rest = parser.parse_known_args(arguments)
    actions, flags = cli.parse(rest)
    if actions.resume or actions.dry_run or actions.print_config:
        raise ConfigError("compare has no --resume, --dry-run or --print-config: the same command goes on by itself")
    for name, value in (
        ("evaluations", namespace.evaluations),
        ("seconds", namespace.seconds),
        ("jobs", namespace.jobs),
    ):
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"--{name} {value}: must be above 0")
    if len(set(namespace.seeds)) < len(namespace.seeds):
        raise ConfigError(f"--seeds {' '.join(map(str, namespace.seeds))} names one twice")
    named: dict[str, Any] = {name: {"method": name} for name in namespace.methods}
    if namespace.arms:
        named = read_yaml(namespace.arms)
        for name, settings in named.items():
            if not isinstance(settings, dict) or not re.fullmatch(r"[A-Za-z][\w.+-]*", str(name)) or name == "base":
                raise ConfigError(
                    f"{namespace.arms}: arm {name}: write NAME: {{setting: value}}, names of letters, digits, . + -"
                )
    if not named:
        raise ConfigError(f"{namespace.arms} names no arms: write NAME: {{setting: value}}")
    if "updates" in flags and (namespace.evaluations or namespace.seconds):
        raise ConfigError("--updates beside --evaluations or --seconds: there is one budget: leave --updates out")
    if namespace.seconds and namespace.jobs > 1:
        raise ConfigError("--seconds with --jobs: runs at the same time slow each other down; leave --jobs out")
    # The noise of the evaluation; those of training are --seeds.
    evaluation_seed = make_config([("flags", {"seed": flags.pop("seed", 0)})]).seed

    def layers(settings: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        return cli.layers(actions, flags, settings)

    cli.hush()
    from . import compare as work

    folder = namespace.output_dir
    budget = {k: getattr(namespace, k) for k in ("evaluations", "seconds") if getattr(namespace, k) is not None}
    made = work.make_arms(named, namespace.seeds, layers, folder.resolve(), budget)
    return _told(
        lambda: work.compare(made, folder.resolve(), budget, namespace.jobs, namespace.launch, evaluation_seed)
    )


def serve(arguments: Sequence[str]) -> int:
    parser = _parser(
        "serve",
        "Serves scorers over HTTP, for `--reward remote` of a trainer: POST /compute (or /NAME/compute), GET /health.",
    )
    _add_scorer_flags(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at [127.0.0.1]")
    parser.add_argument("--port", type=int, default=18085, help="0 for any that is free [18085]")
    namespace = parser.parse_args(arguments)
    config = cli.make_config([("flags", {"reward": namespace.reward, "reward_models": namespace.reward_models})])
    cli.hush()
    from . import loading
    from .rewards.serve import serve

    loading.quiet()
    paths = dict(entry.split("=", 1) for entry in config.reward_models)
    return serve(config.reward, namespace.host, namespace.port, loading.choose_device(namespace.device), paths)


def fetch(arguments: Sequence[str]) -> int:
    from . import fetch as fetching

    parser = _parser(
        "fetch",
        "Downloads scorers and models into the hub's cache (HF_HOME), and prompt lists of the literature into a folder; "
        "checks their hashes.",
    )
    parser.add_argument("--reward", nargs="+", default=[], metavar="NAME", help="scorers")
    parser.add_argument("--prompts", nargs="+", default=[], metavar="NAME", help=", ".join(fetching.PROMPTS))
    parser.add_argument("--model", nargs="+", default=[], metavar="ID", help="models to train, e.g. owner/name")
    parser.add_argument("--features", metavar="ID", help="a DINOv2 for cosine diversity, e.g. facebook/dinov2-large")
    parser.add_argument("--output-dir", type=Path, default=Path("prompts"), help="for prompt lists [prompts]")
    namespace = parser.parse_args(arguments)
    if not (namespace.reward or namespace.prompts or namespace.model or namespace.features):
        raise ConfigError("fetch what? Give --reward, --prompts, --model or --features")
    return fetching.fetch(
        namespace.reward, namespace.prompts, namespace.model, namespace.features, namespace.output_dir
    )


def prompts(arguments: Sequence[str]) -> int:
    parser = _parser(
        "prompts",
        "Prints generated prompts with their metadata as .jsonl: `geneval` (objects, counts, colours, places) or `ocr` "
        "(texts). Training and held-out prompts never share a scene or a text.",
    )
    parser.add_argument("kind", choices=("geneval", "ocr"))
    parser.add_argument("--split", choices=("train", "heldout"), default="train", help="[train]")
    parser.add_argument("--count", type=int, default=1000, help="[1000]")
    parser.add_argument("--seed", type=int, default=0, help="[0]")
    parser.add_argument(
        "--exclude",
        type=Path,
        metavar="FILE",
        help="geneval: leave out the scenes of this .jsonl, e.g. the paper's tests",
    )
    namespace = parser.parse_args(arguments)
    from .prompt_lists import compositional, rendering
    from .prompts import read_prompts
    from .rewards import check_prompts

    if namespace.count < 1:
        raise ConfigError(f"--count {namespace.count}: at least 1")
    try:
        if namespace.kind == "geneval":
            excluded = read_prompts(namespace.exclude) if namespace.exclude else None
            if excluded is not None:
                check_prompts(["geneval"], excluded)
            scenes = excluded.metadata.values() if excluded else ()
            entries = compositional.generate(namespace.split, namespace.count, namespace.seed, scenes)
        elif namespace.exclude:
            raise ConfigError("--exclude is for geneval")
        else:
            entries = rendering.generate(namespace.split, namespace.count, namespace.seed)
    except ValueError as error:
        raise ConfigError(f"prompts {namespace.kind}: {error}") from None
    for entry in entries:
        print(json.dumps(entry))
    return 0


def inspect(arguments: Sequence[str]) -> int:
    parser = _parser("inspect", "Prints what a LoRA was trained on and checks it.")
    parser.add_argument("file", type=Path, help="a LoRA's safetensors file, or a run's folder")
    file = parser.parse_args(arguments).file
    from . import lora_file

    text, sound = lora_file.describe(file)
    print(text)
    return 0 if sound else 1


def toy(arguments: Sequence[str]) -> int:
    parser = _parser(
        "toy",
        "The toy of the paper's Fig. 2 on a CPU in minutes: a mixture of Gaussians in the plane, five of nine modes rewarded, "
        "and a three-layer MLP, trained by GRPO, GRPO + KL, Softmax-TB and anchored Softmax-TB on the same trees. Prints a "
        "table of rewards and covered modes; writes it as toy.md and toy.json, and a picture, toy.png. See docs/method.md.",
    )
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="runs of every arm, seeds 0..N-1 [5]")
    parser.add_argument("--updates", type=int, default=1000, metavar="N", help="per run [1000]")
    parser.add_argument("--learning-rate", type=float, default=3e-3, metavar="X", help="of every arm [3e-3]")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/toy"), metavar="DIR", help="[outputs/toy]")
    parser.add_argument(
        "--controls",
        action="store_true",
        help="eleven more arms, in the tables alone (chains, KL, inner updates, sum, beta): minutes more",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=2,
        metavar="N",
        help="runs at a time, one thread each; the figures are the same [2]",
    )
    namespace = parser.parse_args(arguments)
    for name in ("seeds", "updates", "workers"):
        if getattr(namespace, name) < 1:
            raise ConfigError(f"--{name} {getattr(namespace, name)}: at least 1")
    if not 0 < namespace.learning_rate < 1:
        raise ConfigError(f"--learning-rate {namespace.learning_rate}: between 0 and 1")
    from .toy_report import run

    flags = (namespace.seeds, namespace.updates, namespace.learning_rate, namespace.output_dir)
    return _told(lambda: run(*flags, namespace.controls, namespace.workers))


def launch_configs() -> dict[str, Path]:
    """The accelerate configs that come with the package, by name."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "accelerate").glob("*.yaml"))}


def launch(arguments: Sequence[str]) -> int:
    configs = launch_configs()
    parser = _parser(
        "launch",
        "Trains on several GPUs of this machine: accelerate launch with a config of this package.",
        "All other flags are those of training. On several machines use torchrun, see docs/training.md.",
    )
    parser.add_argument("name", choices=configs, help="ddp: a whole model per GPU; fsdp2: its weights shared")
    parser.add_argument("--num-processes", type=int, help="by default one per GPU")
    namespace, flags = parser.parse_known_args(arguments)
    actions, settings = cli.parse(flags)
    if actions.resume is None:
        cli.configure(actions, settings, None)
    count = namespace.num_processes
    if count is None:
        import torch

        count = torch.cuda.device_count()
        if count < 2:
            raise ConfigError(
                f"launch {namespace.name} is for two GPUs or more, torch sees {count}: leave out `launch`"
            )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(configs[namespace.name])]
    return subprocess.call([*command, "--num_processes", str(count), "-m", "tmpo_trainer", *flags])


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "evaluate": evaluate,
    "compare": compare,
    "score": score,
    "serve": serve,
    "fetch": fetch,
    "prompts": prompts,
    "inspect": inspect,
    "toy": toy,
    "launch": launch,
}
