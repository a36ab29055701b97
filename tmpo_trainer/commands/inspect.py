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

    lora = lora_file.read(file)
    more = {}
    if not any(name.startswith("transformer.") for name in lora.layers):
        # diffusers takes seconds to import.
        from ..lora.layers import readers

        names = " and ".join(readers(lora))
        more = {f"diffusers converts its names{f' for {names}' if names else ''}": bool(names)}
    text, sound = lora_file.describe(lora, more)
    print(text)
    return 0 if sound else 1
