"""`toy`: the paper's Fig. 2."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..settings.errors import ConfigError
from .flags import command_parser, exit_code, path_flag


def command(arguments: Sequence[str]) -> int:
    """Runs the command. Returns the exit code."""
    parser = command_parser(
        "toy",
        "Runs the toy experiment of the paper's Fig. 2 on a CPU in minutes. The data are a mixture of nine Gaussians in the "
        "plane, five of which are rewarded. GRPO, GRPO + KL, Softmax-TB and anchored Softmax-TB train a three-layer MLP on the "
        "same trees. Prints a table of rewards and covered modes; writes it as toy.md and toy.json, and a picture, toy.png. "
        "See docs/method.md.",
    )
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="runs of every arm, seeds 0..N-1 [5]")
    parser.add_argument("--updates", type=int, default=1000, metavar="N", help="updates per run [1000]")
    parser.add_argument("--learning-rate", type=float, default=3e-3, metavar="X", help="for every arm [3e-3]")
    parser.add_argument(
        "--output-dir", type=path_flag, default=Path("outputs/toy"), metavar="DIR", help="for results [outputs/toy]"
    )
    parser.add_argument(
        "--controls",
        action="store_true",
        help="train seventeen more arms for the tables (chains, KL, inner updates, sum, beta, noised leaves), in minutes more",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=2,
        metavar="N",
        help="runs at the same time, one thread each; the figures do not depend on it [2]",
    )
    namespace = parser.parse_args(arguments)
    for name in ("seeds", "updates", "workers"):
        if getattr(namespace, name) < 1:
            raise ConfigError(f"--{name} {getattr(namespace, name)}: must be at least 1")
    if not 0 < namespace.learning_rate < 1:
        raise ConfigError(f"--learning-rate {namespace.learning_rate}: must be between 0 and 1")
    from ..toy.report import run

    flags = (namespace.seeds, namespace.updates, namespace.learning_rate, namespace.output_dir)
    return exit_code(lambda: run(*flags, namespace.controls, namespace.workers))
