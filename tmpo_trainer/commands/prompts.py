"""`prompts`: generated prompt lists."""

from __future__ import annotations

import json
from collections.abc import Sequence

from ..settings.errors import ConfigError
from .flags import command_parser, path_flag


def command(arguments: Sequence[str]) -> int:
    """Runs the command. Returns the exit code."""
    parser = command_parser(
        "prompts",
        "Prints generated prompts with their metadata as .jsonl: `geneval` (objects, counts, colours, places) or `ocr` "
        "(texts). Training and held-out prompts never share a scene or a text.",
    )
    parser.add_argument("kind", choices=("geneval", "ocr"))
    parser.add_argument(
        "--split", choices=("train", "heldout"), default="train", help="which prompts to generate [train]"
    )
    parser.add_argument("--count", type=int, default=1000, help="number of prompts [1000]")
    parser.add_argument("--seed", type=int, default=0, help="seed of the generator [0]")
    parser.add_argument(
        "--exclude",
        type=path_flag,
        metavar="FILE",
        help="geneval: a .jsonl whose scenes are left out, e.g. the paper's test prompts",
    )
    namespace = parser.parse_args(arguments)
    from ..prompts import compositional, rendering
    from ..prompts.lists import read_prompts
    from ..rewards import check_prompts

    if namespace.count < 1:
        raise ConfigError(f"--count {namespace.count}: must be at least 1")
    try:
        if namespace.kind == "geneval":
            excluded = read_prompts(namespace.exclude) if namespace.exclude else None
            if excluded is not None:
                check_prompts(["geneval"], excluded)
            scenes = excluded.metadata.values() if excluded else ()
            entries = compositional.generate(namespace.split, namespace.count, namespace.seed, scenes)
        elif namespace.exclude:
            raise ConfigError("--exclude is for geneval: leave it out")
        else:
            entries = rendering.generate(namespace.split, namespace.count, namespace.seed)
    except ValueError as error:
        raise ConfigError(f"prompts {namespace.kind}: {error}") from None
    for entry in entries:
        print(json.dumps(entry))
    return 0
