"""What a page sees during sampling: previews of the demo model, the mosaic of all leaves, the growing tree."""

from __future__ import annotations

import asyncio
import io
import json
import os
import urllib.request
from base64 import b64decode
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from tmpo_trainer.demo import previews
from tmpo_trainer.tree import TreePlan

pytestmark = pytest.mark.skipif(not os.environ.get("COMFYUI_PATH"), reason="COMFYUI_PATH names no checkout of ComfyUI")


@pytest.fixture(scope="module")
def live(nodes: Any) -> Any:
    from tmpo_pack.nodes import live  # type: ignore[import-not-found]

    return live


def test_previews_of_the_demo_model_resemble_its_pictures(nodes: Any, live: Any) -> None:
    """Stable Diffusion 3's own map shows something else. In an older ComfyUI its own samplers take a linear map alone."""
    model, clip, vae = nodes.demo_model.load_model(), nodes.demo_model.load_clip(), nodes.demo_model.load_vae()
    prompt = clip.encode_from_tokens_scheduled(clip.tokenize("two red circles and a blue square"))
    found = nodes.sampling.TreeSamplerNode.execute(
        model, prompt, prompt, {"samples": torch.zeros(2, 16, 8, 8)}, 3, 6, 1.0, "normal", "1, 2", 3, "cps", 0.7, 0
    ).result[0]["samples"]
    pictures = vae.decode(found).movedim(-1, 1)

    def share(kind: Any) -> float:
        shown = live.in_colour(kind.process_in(found), kind).movedim(-1, 1)
        return previews.explained(shown, torch.nn.functional.adaptive_avg_pool2d(pictures, shown.shape[2:]))

    assert share(model.model.latent_format) > 0.7
    assert share(nodes.comfy.latent_formats.SD3()) < 0
    # ComfyUI's own samplers show them, too.
    kind = model.model.latent_format
    more = [kind.latent_rgb_factors_reshape] if hasattr(kind, "latent_rgb_factors_reshape") else []
    stock = live.latent_preview.Latent2RGBPreviewer(kind.latent_rgb_factors, kind.latent_rgb_factors_bias, *more)
    assert stock.decode_latent_to_preview(kind.process_in(found)).size == ((32, 32) if more else (8, 8))


class Shown(list):
    """Stands for ComfyUI's progress bar."""

    def update_absolute(self, done: int, total: int, picture: Any = None) -> None:
        self.append((done, total, None if picture is None else picture[1]))


def run(live: Any, monkeypatch: pytest.MonkeyPatch, plan: TreePlan, seconds: float) -> Shown:
    """Sampling at one second per call of the model. Nodes are coloured by their path: red the root, green the child.

    seconds: what it takes to make a picture.
    """
    clock, shown = [0.0], Shown()

    def decode(kind: str, x0: torch.Tensor) -> tuple[str, Image.Image, int]:
        clock[0] += seconds
        return kind, Image.new("RGB", (40, 20), tuple(int(v) for v in x0.flatten())), 512

    monkeypatch.setattr(
        live.latent_preview, "get_previewer", lambda *_: SimpleNamespace(decode_latent_to_preview_image=decode)
    )
    monkeypatch.setattr(live.comfy.utils, "ProgressBar", lambda total: shown)
    monkeypatch.setattr(live.time, "perf_counter", lambda: clock[0])
    patcher = SimpleNamespace(load_device=None, model=SimpleNamespace(latent_format=None))
    preview = live.Live(SimpleNamespace(model_patcher=patcher), plan, [1.0] * (plan.num_steps + 1), 0)
    done = 0
    for width in plan.widths:
        rows = torch.tensor([[[[50.0 * (row % 3 + 1)]], [[50.0 * (row // 3)]], [[0.0]]] for row in range(width)])
        for x0 in rows.split(3):
            clock[0] += 1
            done += len(x0)
            preview(done, plan.rollout_evaluations, x0)
    return shown


def test_all_leaves_have_their_places_from_the_start(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three seeds, three children each, in calls of three: nine leaves as a square, every seed a row."""
    shown = run(live, monkeypatch, TreePlan.tmpo(3, (1, 2), 3), 0)
    assert [done for done, _, _ in shown] == [3, 6, 9, 12, 15] and {total for _, total, _ in shown} == {15}
    sizes = {picture.size for _, _, picture in shown}
    assert len(sizes) == 1 and max(*sizes) <= 512

    def colours(picture: Image.Image) -> list[list[tuple[int, ...]]]:
        w, h = picture.width / 3, picture.height / 3
        return [[picture.getpixel((int((x + 0.5) * w), int((y + 0.5) * h)))[:2] for x in range(3)] for y in range(3)]

    # Roots first, at the places of all their leaves. Then leaf by leaf, here all first children.
    assert colours(shown[1][2]) == [[(50 * (seed + 1), 0)] * 3 for seed in range(3)]
    assert colours(shown[3][2]) == [[(50 * (seed + 1), 50 * c) for c in (0, 1, 0)] for seed in range(3)]
    assert colours(shown[4][2]) == [[(50 * (seed + 1), 50 * c) for c in (0, 1, 2)] for seed in range(3)]


def test_slow_pictures_are_shown_less_often(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take at most 1% of the time, but for a moment at the start, and the last picture, which is complete."""
    plan = TreePlan.tmpo(102, (1, 2), 3)
    shown = run(live, monkeypatch, plan, 0.1)
    assert len(shown) == 302 and shown[-1][0] == plan.rollout_evaluations
    pictures = [picture for *_, picture in shown if picture is not None]
    assert shown[0][2] is not None and shown[-1][2] is not None
    # A picture takes 0.3 s for 3 nodes to 1.2 s for the 12 that wait at most.
    assert 1 + 0.01 * 302 / 1.2 < len(pictures) < 3 + 0.01 * 302 / 0.3


GRAPH = {
    "1": {"class_type": "TMPO_DemoModelLoader", "inputs": {}},
    "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "two red circles"}},
    "3": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
    "4": {
        "class_type": "TMPO_TreeSampler",
        "inputs": {
            "model": ["1", 0], "positive": ["2", 0], "negative": ["2", 0], "latent_image": ["3", 0], "seed": 2**63 + 1,
            "steps": 6, "cfg": 1.0, "scheduler": "normal", "branch_steps": "1, 3", "branching": 2, "kernel": "cps",
            "eta": 0.7, "max_batch": 0,
        },
    },
    "5": {"class_type": "VAEDecode", "inputs": {"samples": ["4", 0], "vae": ["1", 2]}},
    "6": {"class_type": "PreviewImage", "inputs": {"images": ["5", 0]}},
}  # fmt: skip


def test_the_tree_grows_on_the_page_that_has_queued_it(comfy: Any) -> None:
    aiohttp = pytest.importorskip("aiohttp")

    async def listen(client: str) -> list[dict[str, Any]]:
        address = f"http://127.0.0.1:{comfy.port}"
        found: list[dict[str, Any]] = []
        async with aiohttp.ClientSession() as session, session.ws_connect(f"{address}/ws?clientId=page") as socket:
            data = json.dumps({"prompt": GRAPH, "client_id": client}).encode()
            request = urllib.request.Request(f"{address}/prompt", data, {"Content-Type": "application/json"})
            prompt = json.loads(await asyncio.to_thread(lambda: urllib.request.urlopen(request).read()))["prompt_id"]
            waiting = asyncio.create_task(asyncio.to_thread(comfy.wait, prompt))
            while not waiting.done():
                try:
                    message = await socket.receive(timeout=1)
                except TimeoutError:
                    continue
                if (
                    message.type == aiohttp.WSMsgType.TEXT
                    and (event := json.loads(message.data))["type"] == "tmpo.growing"
                ):
                    found.append(event["data"])
            waiting.result()
        return found

    events = asyncio.run(listen("page"))
    assert {event["node"] for event in events} == {"4"}
    tree = events[0]["tree"]
    assert tree["seed"] == str(2**63 + 1) and tree["growing"] and len(tree["leaves"]) == 4 and tree["aspect"] == 1
    assert all("tree" not in event for event in events[1:])
    # In the end every node has its picture: the two seeds at step 3, and their four leaves.
    seen = {int(key): url for event in events for key, url in event["pictures"].items()}
    inner = [node["id"] for node in tree["nodes"] if node["step"] == 3]
    assert sorted(seen) == sorted([*inner, *(leaf["id"] for leaf in tree["leaves"])])
    for url in seen.values():
        kind, data = url.split(",")
        assert kind == "data:image/jpeg;base64" and max(Image.open(io.BytesIO(b64decode(data))).size) <= 96
    # Another program's prompt shows nothing on this page.
    GRAPH["4"]["inputs"]["seed"] = 1
    assert asyncio.run(listen("script")) == []
