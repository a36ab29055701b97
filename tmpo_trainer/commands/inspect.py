"""`inspect`: what a LoRA was trained on."""

from __future__ import annotations

from collections.abc import Sequence

from .flags import command_parser, path_flag


def command(arguments: Sequence[str]) -> int:
    """Runs the command. Returns the exit code."""
    parser = command_parser("inspect", "Prints what a LoRA was trained on and checks it.")
    parser.add_argument("file", type=path_flag, help="a LoRA's safetensors file, or a run's folder")
    file = parser.parse_args(arguments).file
    from ..lora import file as lora_file

    text, sound = lora_file.describe(file)
    print(text)
    return 0 if sound else 1
