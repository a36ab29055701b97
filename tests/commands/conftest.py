"""A working directory with good and bad files, and the flags of a short run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest


@pytest.fixture
def place(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with good and bad files in it."""
    monkeypatch.chdir(tmp_path)
    texts = {
        "good.txt": "a red circle\ntwo blue squares\n",
        "empty.txt": "\n# only a comment\n",
        "foreign.txt": "a red circle\na photo of a cat\n",
        "signs.jsonl": '{"prompt": "a sign", "target": "open"}\n',
        "bare.jsonl": '{"prompt": "a red circle"}\n["a red circle"]\n',
        "text.jsonl": "a red circle\n",
        "twice.jsonl": '{"prompt": "a red circle", "a": 1}\n\n{"prompt": "a red circle", "a": 2}\n',
        "good.yaml": "learning_rate: 5e-5\nupdates: 70\nguidance: 2\n",
        "unknown.yaml": "learning_rat: 1.0e-4\n",
        "broken.yaml": "updates: [1\nseed: }",
        "list.yaml": "- updates\n",
        "value.yaml": "updates: many\n",
        "run/metrics.jsonl": '{"update": 1}\n',
        "lora/pytorch_lora_weights.safetensors": "",
        "no-pipeline/config.json": "{}",
        "unnamed/model_index.json": "{}",
        "sana/model_index.json": json.dumps({"_class_name": "SanaPipeline"}),
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.txt").write_bytes("ein roter Würfel".encode("latin-1"))
    shutil.copytree(tiny_model, tmp_path / "without-vae")
    shutil.rmtree(tmp_path / "without-vae" / "vae")
    shutil.copytree(tiny_model, tmp_path / "cut")
    weights = tmp_path / "cut" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return tmp_path


@pytest.fixture
def base(tiny_model: Path) -> list[str]:
    """Flags of a short run on the tiny model; later flags win."""
    text = f"""--model {tiny_model} --prompts good.txt --eval-prompts good.txt --no-report --updates 2 --sample-every 0
        --rollout-steps 6 --branch-early 1 2 3 --branch-late 1 3 4 --resolution 32 32 --output-dir out --lora-rank 4"""
    return text.split()
