"""A real ComfyUI with the pack in its custom_nodes, asked over HTTP and websocket as its page does.

Needs a checkout of ComfyUI and what it requires: COMFYUI_PATH=/path/to/ComfyUI pytest tests/comfy
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

COMFYUI = os.environ.get("COMFYUI_PATH")
REPOSITORY = Path(__file__).parents[2]
#: Hides the packages that the pack must not need from the server. A training process that it starts still has them.
HIDE = """
import sys
from importlib.machinery import PathFinder

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] in ("diffusers", "peft", "accelerate", "matplotlib", "cv2")
        return None if hidden else super().find_spec(name, path, target)

if "main.py" in sys.orig_argv:
    sys.meta_path[:] = [Hiding if finder is PathFinder else finder for finder in sys.meta_path]
"""
Graph = dict[str, dict[str, Any]]


class GraphError(Exception):
    """The error of a node or of the validation of a graph."""


class Comfy:
    """A running server. base: its base directory. log: what it has printed."""

    def __init__(self, base: Path, port: int, process: subprocess.Popen[str], log: Path):
        self.base, self.port, self.process, self.log = base, port, process, log

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as reply:
            return reply.read()

    def post(self, path: str, content: Any) -> Any:
        data = json.dumps(content).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                text = reply.read()
        except urllib.error.HTTPError as error:
            raise GraphError(error.read().decode()) from None
        return json.loads(text) if text else None

    def queue(self, graph: Graph) -> str:
        return self.post("/prompt", {"prompt": graph, "client_id": uuid.uuid4().hex})["prompt_id"]

    def wait(self, prompt: str, seconds: float = 120) -> dict[str, Any]:
        """Outputs for the page by node id. Raises GraphError with the node's message."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            history = json.loads(self.get(f"/history/{prompt}"))
            if prompt in history:
                for kind, message in history[prompt]["status"]["messages"]:
                    if kind == "execution_error":
                        raise GraphError(f"{message['node_type']}: {message['exception_message']}")
                    if kind == "execution_interrupted":
                        raise GraphError("interrupted")
                return history[prompt]["outputs"]
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            time.sleep(0.05)
        raise AssertionError(f"not done within {seconds} s")

    def run(self, graph: Graph) -> dict[str, Any]:
        return self.wait(self.queue(graph))

    def executed(self, graph: Graph) -> set[str]:
        """The nodes that a graph has run and not taken from the cache."""
        prompt = self.queue(graph)
        self.wait(prompt)
        messages = json.loads(self.get(f"/history/{prompt}"))[prompt]["status"]["messages"]
        return graph.keys() - {
            node for kind, about in messages if kind == "execution_cached" for node in about["nodes"]
        }

    def image(self, reference: dict[str, str]) -> np.ndarray:
        query = "&".join(f"{key}={value}" for key, value in reference.items())
        return np.asarray(Image.open(io.BytesIO(self.get(f"/view?{query}"))).convert("RGB"))


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The pack's nodes in a ComfyUI within this process, as ComfyUI imports them. Nodes run in inference mode."""
    if not COMFYUI:
        pytest.skip("COMFYUI_PATH names no checkout of ComfyUI")
    sys.path.insert(0, COMFYUI)
    from comfy.cli_args import args  # type: ignore[import-not-found]

    args.cpu = True
    import comfy.sample  # type: ignore[import-not-found]
    import comfy.samplers  # type: ignore[import-not-found]
    import folder_paths  # type: ignore[import-not-found]

    # Pictures for the page would go into the checkout.
    folder_paths.set_temp_directory(str(tmp_path_factory.mktemp("temp")))
    with torch.inference_mode():
        if "tmpo_pack" not in sys.modules:
            spec = importlib.util.spec_from_file_location(
                "tmpo_pack", REPOSITORY / "__init__.py", submodule_search_locations=[str(REPOSITORY)]
            )
            assert spec is not None and spec.loader is not None
            sys.modules["tmpo_pack"] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        from tmpo_pack.nodes import (  # type: ignore[import-not-found]
            demo_model,
            diversity,
            lora,
            sampling,
            share,
            training,
            tree_sampler,
            tree_view,
        )

        yield SimpleNamespace(
            comfy=comfy, demo_model=demo_model, diversity=diversity, lora=lora, sampling=sampling, share=share,
            training=training, tree_sampler=tree_sampler, tree_view=tree_view,
        )  # fmt: skip
    sys.path.remove(COMFYUI)


@pytest.fixture(scope="session")
def comfy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Comfy]:
    """The pack lies in a folder with a hyphen in its name, as ComfyUI-Manager would put it, without the trainer's packages."""
    if not COMFYUI:
        pytest.skip("COMFYUI_PATH names no checkout of ComfyUI")
    base = tmp_path_factory.mktemp("comfy")
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "tmpo-trainer").symlink_to(REPOSITORY)
    (base / "models" / "loras").mkdir(parents=True)
    (base / "hide").mkdir()
    (base / "hide" / "sitecustomize.py").write_text(HIDE)
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(base / "hide")}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = base / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "main.py", "--cpu", "--port", str(port), "--disable-auto-launch", "--base-directory", str(base),
             "--preview-method", "latent2rgb"],
            cwd=COMFYUI, env=variables, stdout=output, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
    server = Comfy(base, port, process, log)
    deadline = time.monotonic() + 300
    while True:
        try:
            server.get("/system_stats")
            break
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.2)
    yield server
    process.terminate()
    process.wait(30)
