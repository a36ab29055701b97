"""`serve`: scorers over HTTP."""

from __future__ import annotations

from collections.abc import Sequence

from ..settings.presets import make_config
from .flags import add_scorer_flags, command_parser, hush


def command(arguments: Sequence[str]) -> int:
    """Runs the command. Returns the exit code."""
    parser = command_parser(
        "serve",
        "Serves scorers over HTTP, for `--reward remote` of a trainer: POST /compute (or /NAME/compute), GET /health. "
        "If the environment variable TMPO_REWARD_TOKEN is set, clients need the same value.",
    )
    add_scorer_flags(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on [127.0.0.1]")
    parser.add_argument("--port", type=int, default=18085, help="port; 0 takes any free one [18085]")
    parser.add_argument(
        "--server-names",
        nargs="+",
        default=[],
        metavar="NAME",
        help="names of this machine that clients use, besides localhost, --host and IP addresses",
    )
    namespace = parser.parse_args(arguments)
    config = make_config([("flags", {"reward": namespace.reward, "reward_models": namespace.reward_models})])
    hush()
    from ..rewards.server.serve import serve
    from . import loading

    loading.quiet()
    paths = dict(entry.split("=", 1) for entry in config.reward_models)
    device = loading.choose_device(namespace.device)
    return serve(config.reward, namespace.host, namespace.port, device, paths, namespace.server_names)
