"""Broken and hostile LoRA files: every one is read or refused in one line, in little time and memory.

`FUZZ=3000 pytest tests/lora/test_hostile.py` tries 3000 of them.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import random
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tmpo_trainer.backbones import load_skeleton
from tmpo_trainer.backbones.base import Backbone
from tmpo_trainer.lora import adapter, attach, layers
from tmpo_trainer.lora import file as lora_file
from tmpo_trainer.settings.errors import ConfigError

EXAMPLES = int(os.environ.get("FUZZ", "150"))
SECONDS, KILOBYTES = 2, 1_000_000
WIDTH = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "BOOL": 1,
         "U8": 1, "C64": 8, "F4": 0.5, "F6_E2M3": 0.75, "Q7": 1}  # fmt: skip
#: The names of modules in all formats.
KNOWN = """
transformer.transformer_blocks.0.attn.to_q transformer.transformer_blocks.0.ff.net.2 transformer.proj_out transformer.x_embedder
transformer.single_transformer_blocks.1.attn.to_v transformer transformer_blocks.0.attn.to_q transformer.x.alpha.y processor
diffusion_model.double_blocks.0.img_attn.qkv lora_unet_double_blocks_0_img_attn_qkv lora_unet_single_blocks_0_linear1
lora_unet_single_blocks_0_linear2 lora_unet_final_layer_linear lora_unet_final_layer_adaLN_modulation_1 lora_controlnet
lora_unet_guidance_in_in_layer lora_unet_joint_blocks_0_x_block_attn_qkv lora_transformer_transformer_blocks_0_attn_to_q
lora_transformer_single_transformer_blocks_x_attn_to_q lora_transformer_x_embedder lora_te1_text_model_encoder_layers_0_mlp_fc1
double_blocks.0.processor.qkv_lora1 double_blocks.1.processor.proj_lora2 single_blocks.0.processor.qkv_lora time_in.in_layer
base_model.model.transformer_blocks.0.attn.to_q base_model.model.final_layer.linear query_norm.scale transformer.pos_embed.proj
text_encoder.text_model.encoder.layers.0.self_attn.q_proj
"""
MODULES = [
    *KNOWN.split(), "", ".", "transformer.\u202e\x1b[31m\n", "transformer." + "a" * 400,
    "transformer." + "." * 600, "\U0001f600",
]  # fmt: skip
ENDINGS = [*lora_file.PAIRS.items(),
    (".lora.down.weight", ".lora.up.weight"), ("_lora.down.weight", "_lora.up.weight"), (".lora_A", ".lora_B"),
    (".processor.to_out_lora.down.weight", ".processor.to_out_lora.up.weight"),
]  # fmt: skip
LOOSE = (".alpha", ".dora_scale", ".lora_magnitude_vector", ".lora_B.bias", ".diff", ".diff_b", ".lokr_w1", ".lora_mid.weight",
         ".norm.diff", ".norm_q.weight", ".reshape_weight", ".lora_A.weight", "")  # fmt: skip
NUMBERS: list[Any] = [0, 1, 4, -1, 2.5, 1e308, math.nan, math.inf, 10**30, True, None, "4", [], {}, "(a+)+$", 2**63]
SETTINGS = """r lora_alpha use_rslora use_dora rank_pattern alpha_pattern init_lora_weights target_modules bias modules_to_save
layer_replication peft_type odd"""


class Generator:
    """Makes files that are nearly LoRAs, from a seed."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def size(self) -> int:
        return self.random.choice([0, 1, 2, 3, 4, 4, 4, 8, 32, 32, 33, 64])

    def pair(self) -> tuple[list[int], list[int]]:
        """The shapes of a layer's halves."""
        rank, inputs, outputs = self.random.choice([1, 2, 4, 4, 4, 8, 32]), 32, 32
        if self.chance(0.15):
            inputs, outputs = self.random.choices([32, 64, 96, 128], k=2)
        roll = self.random.random()
        if roll < 0.02:
            rank, inputs, outputs = self.random.choice([20_000, 60_000]), 1, 1
        shapes = [rank, inputs], [outputs, rank]
        if 0.02 < roll < 0.06:
            shapes = [*shapes[0], 1, 1], [*shapes[1], 1, 1]
        elif 0.06 < roll < 0.12:
            odd = [self.size() for _ in range(self.random.randrange(5))]
            shapes = (shapes[0], odd) if self.chance(0.5) else (odd, shapes[1])
        elif 0.12 < roll < 0.13:
            shapes = [0, 10**12], [10**12, 0]
        return shapes

    def tensors(self) -> list[tuple[str, str, list[int]]]:
        """Name, dtype and shape of each tensor."""
        found = []
        usual = self.random.choice(["F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F64"])

        def dtype() -> str:
            return usual if self.chance(0.99) else self.random.choice(list(WIDTH))

        ending = self.random.choice(ENDINGS)
        for module in self.random.choices(MODULES[:1] * 20 + MODULES[1:], k=self.random.randrange(1, 4)):
            if self.chance(0.1):
                ending = self.random.choice(ENDINGS)
            for end, shape in zip(ending, self.pair(), strict=True):
                if self.chance(0.97):
                    found.append((module + end, dtype(), shape))
            if self.chance(0.15):
                shape = self.random.choice([[], [1], [32], [32, 32], [self.size()]])
                found.append((module + self.random.choice(LOOSE), dtype(), shape))
        return found

    def metadata(self) -> dict[str, Any]:
        about: dict[str, Any] = {"tmpo.method": self.random.choice(["tmpo", "\x1b[2J", "x" * 5000])}
        if self.chance(0.5):
            adapter: dict[str, Any] = {"r": 4, "lora_alpha": 8}
            for name in self.random.choices(SETTINGS.split(), k=self.random.randrange(4)):
                values = [
                    *NUMBERS,
                    {self.random.choice(["to_q", "^x", "[", "(.*)*$", "\\", "a" * 9999]): self.random.choice(NUMBERS)},
                ]
                adapter[name] = self.random.choice(values)
            text = json.dumps({f"transformer.{key}": value for key, value in adapter.items()})
            deep = ["[" * 100_000, '{"transformer.r":' * 9, "null", "[]", "4", f'{{"transformer.r": {"9" * 5000}}}']
            about["lora_adapter_metadata"] = self.random.choice(deep) if self.chance(0.2) else text
        if self.chance(0.05):
            name = self.random.choice(["modelspec.architecture", "format", "x"])
            about[name] = self.random.choice(["\0", 4, {"a": {}}, None])
        return about

    def content(self) -> bytes:
        """A file."""
        header: dict[str, Any] = {"__metadata__": self.metadata()} if self.chance(0.8) else {}
        parts, start = [], 0
        for name, dtype, shape in self.tensors():
            size = math.ceil(math.prod(shape) * WIDTH[dtype])
            if name in header:
                continue
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + size]}
            parts.append(self.numbers(dtype, math.prod(shape), size))
            start += size
        if header and self.chance(0.15):
            self.spoil(header)
        text = json.dumps(header).encode()
        if self.chance(0.05) and len(header) > 1:
            # The same key twice.
            key = json.dumps(next(reversed(header))).encode()
            text = text[:-1] + b", " + key + b": " + json.dumps(header[next(reversed(header))]).encode() + b"}"
        length = len(text) if self.chance(0.97) else self.random.choice([0, 1, 2**63, 2**31, 10**8, len(text) - 1])
        content = struct.pack("<Q", length) + text + b"".join(parts)
        return self.damage(content) if self.chance(0.15) else content

    def numbers(self, dtype: str, count: int, size: int) -> bytes:
        if dtype == "F32" and self.chance(0.9):
            return (torch.arange(count) % 7).float().mul(0.01).numpy().tobytes()
        return b"\1" * size if self.chance(0.95) else self.random.randbytes(size)

    def spoil(self, header: dict[str, Any]) -> None:
        """Makes one entry contradict the rest."""
        entry = header[self.random.choice(list(header))]
        key = self.random.choice(["dtype", "shape", "data_offsets"])
        values: list[Any] = [
            [],
            [0, 2**40],
            [-1, 4],
            [2**63] * 2,
            [10**20],
            "F32",
            "F31",
            None,
            [1.5],
            [2**32] * 2,
            {},
            [4, 0],
        ]
        entry[key] = self.random.choice(values)

    def damage(self, content: bytes) -> bytes:
        """Cuts, lengthens or overwrites bytes."""
        place = self.random.randrange(len(content))
        return self.random.choice([
            content[:place], content + b"\0" * 9, content[:place] + self.random.randbytes(3) + content[place + 3 :],
            content[: self.random.randrange(12)],
        ])  # fmt: skip


@pytest.fixture(scope="module")
def skeletons(tiny_flux: Callable[[bool], Path], tiny_sd35: Path) -> list[Backbone]:
    return [load_skeleton(str(folder), torch.float32, 12) for folder in (tiny_flux(True), tiny_sd35)]


def test_every_file_is_read_or_refused(skeletons: list[Backbone], tmp_path: Path) -> None:
    generator, file = Generator(0), tmp_path / "lora.safetensors"
    read, fitted = 0, 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(EXAMPLES):
        file.write_bytes(generator.content())
        start = time.perf_counter()
        for use in (inspect, *(lambda path, s=skeleton: fit(path, s) for skeleton in skeletons)):
            try:
                use(file)
            except ConfigError as error:
                assert str(file) in str(error), number
                assert str(error).isprintable() and len(str(error)) < 1500, number
            except Exception as error:
                raise AssertionError(f"example {number} of seed 0: {type(error).__name__}: {error}") from error
            else:
                read, fitted = read + (use is inspect), fitted + (use is not inspect)
        assert time.perf_counter() - start < SECONDS, f"example {number} of seed 0 takes too long"
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < KILOBYTES, f"example {number} of seed 0 takes {grown / 1e6:.1f} GB"
    # The files are near enough to real ones that some pass.
    assert read > EXAMPLES // 8 and fitted > EXAMPLES // 40


def inspect(file: Path) -> None:
    lora = lora_file.read(file)
    text, _ = lora_file.describe(lora)
    assert text.replace("\n", "").isprintable()
    layers.readers(lora)


def fit(file: Path, skeleton: Backbone) -> None:
    kept = skeleton.transformer
    skeleton.transformer = copy.deepcopy(kept)
    try:
        attach.attach(skeleton, file)
    finally:
        skeleton.transformer = kept
    with contextlib.suppress(ConfigError):
        adapter.check_fits(file, skeleton, "all-linear", 8)
