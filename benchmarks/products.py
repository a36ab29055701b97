"""Times FLUX's largest matrix products in bfloat16 and fp8, and its forward pass by attention backend, on a GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tmpo_trainer.settings.errors import one_line

from . import random_model

#: Rows, columns in, columns out: 27 latents of 512 pixels with 256 tokens of text.
PRODUCTS = ((34560, 3072, 12288), (34560, 3072, 3072), (34560, 15360, 3072))
BACKENDS = ("native", "_native_cudnn", "_native_flash", "_native_efficient")
#: Of float8_e4m3fn.
LARGEST = 448.0


def milliseconds(call: Callable[[], object], times: int = 5) -> float:
    """The median of several calls after a first one."""
    call()
    found = []
    for _ in range(times):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end))
    return statistics.median(found)


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix in fp8 with a scale per row."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return (x / scale).to(torch.float8_e4m3fn), scale


def products() -> list[dict[str, Any]]:
    """Milliseconds in bfloat16, in fp8, and of rounding the input, eager and compiled; the relative error of fp8."""
    compiled: Any = torch.compile(rounded, dynamic=True)
    found = []
    for rows, into, out in PRODUCTS:
        x = torch.randn(rows, into, device="cuda", dtype=torch.bfloat16)
        weight = torch.randn(out, into, device="cuda", dtype=torch.bfloat16) * 0.02
        (x8, x_scale), (w8, w_scale) = rounded(x), rounded(weight)

        def fp8(a: Tensor = x8, b: Tensor = w8, p: Tensor = x_scale, q: Tensor = w_scale) -> Tensor:
            return torch._scaled_mm(a, b.t(), p, q.t(), out_dtype=torch.bfloat16, use_fast_accum=True)

        exact = torch.nn.functional.linear(x, weight).float()
        found.append(
            {
                "product": f"{rows} x {into} x {out}",
                "bfloat16": milliseconds(lambda x=x, weight=weight: torch.nn.functional.linear(x, weight)),
                "fp8": milliseconds(fp8),
                "rounding": milliseconds(lambda x=x: rounded(x)),
                "rounding, compiled": milliseconds(lambda x=x: compiled(x)),
                "error": ((fp8().float() - exact).norm() / exact.norm()).item(),
            }
        )
    return found


@torch.no_grad()
def forward_passes() -> list[dict[str, Any]]:
    """Milliseconds per latent of a forward pass, by attention backend of diffusers, batch and resolution."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            network: Any = random_model.flux_transformer([19, 38], 24).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    found = []
    for batch, pixels in ((1, 512), (9, 512), (27, 512), (4, 1024)):
        side = pixels // 16
        ids = torch.cartesian_prod(torch.zeros(1), *[torch.arange(float(side))] * 2).cuda()
        given = {
            "hidden_states": torch.randn(batch, side * side, 64, device="cuda", dtype=torch.bfloat16),
            "encoder_hidden_states": torch.randn(batch, 256, 4096, device="cuda", dtype=torch.bfloat16),
            "pooled_projections": torch.randn(batch, 768, device="cuda", dtype=torch.bfloat16),
            "timestep": torch.full((batch,), 0.5, device="cuda", dtype=torch.bfloat16),
            "guidance": torch.full((batch,), 3.5, device="cuda"), "img_ids": ids,
            "txt_ids": torch.zeros(256, 3, device="cuda"), "return_dict": False,
        }  # fmt: skip
        row: dict[str, Any] = {"batch": batch, "pixels": pixels}
        for backend in BACKENDS:
            try:
                network.set_attention_backend(backend)
                row[backend] = milliseconds(lambda given=given: network(**given), 3) / batch
            except (RuntimeError, ValueError, ImportError) as error:
                row[backend] = one_line(error)
        found.append(row)
    return found
