"""What is wrong with a graph is said when it is queued, or before anything is sampled; what is only odd, in a notice."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

PROMPT = "two red circles"


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def graph(scoring: dict[str, Any] | None = None, side: int = 64, **sampling: Any) -> dict[str, dict[str, Any]]:
    """A small tree of the demo model, scored. 2 is the encoder, 4 the sampler, 6 Score Images, 9 a text."""
    tree = {
        "seed": 5, "steps": 4, "cfg": 1.0, "scheduler": "normal", "branch_steps": "1, 2", "branching": 2, "kernel": "cps",
        "eta": 0.7, "max_batch": 0,
    }  # fmt: skip
    scores = {"prompt": PROMPT, "reward": "shapes", "model": "(hub)", "metadata": ""}
    return {
        "1": node("TMPO_DemoModelLoader"),
        "2": node("CLIPTextEncode", clip=["1", 1], text=PROMPT),
        "3": node("EmptySD3LatentImage", width=side, height=side, batch_size=1),
        "4": node("TMPO_TreeSampler", model=["1", 0], positive=["2", 0], negative=["2", 0], latent_image=["3", 0],
                  **{**tree, **sampling}),
        "5": node("VAEDecode", samples=["4", 0], vae=["1", 2]),
        "6": node("TMPO_ScoreImages", images=["5", 0], **{**scores, **(scoring or {})}),
        "7": node("PreviewAny", source=["6", 1]),
        "9": node("PrimitiveStringMultiline", value=""),
    }  # fmt: skip


def selecting(mode: str, **inputs: Any) -> dict[str, dict[str, Any]]:
    given = {"images": ["5", 0], "mode": mode, "count": 3, "min_score": 0.0, "beta": 2.0, "seed": 0, "index": 0}
    return {
        **graph(),
        "8": node("TMPO_SelectBranches", **{**given, **inputs}),
        "10": node("PreviewAny", source=["8", 3]),
    }


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (graph({"prompt": " "}), "the prompt is empty"),
        (graph({"reward": "ocr", "prompt": 'a sign that says "TAXI"'}), "reward ocr needs rapidocr.*: pip install rapidocr"),
        (graph(branch_steps="1, 5"), "branch step 5 is beyond the 4 steps"),
        (graph(branch_steps="one"), "write numbers"),
        (graph(branch_steps="1, 2, 3, 4", branching=6), "the tree has 1296 leaves, at most 1024"),
        (graph(branching=0), "branching is 0: choose 1 to 16"),
        (graph(eta=1.5), "eta 1.5 is too large for kernel cps"),
        (graph(eta=-1.0), "choose 0 to 2"),
        (selecting("best by score"), "mode best by score needs scores: connect a Score Images"),
        (selecting("by choice"), "mode by choice needs a choice: connect `choice` of a Tree View"),
    ],
    ids=["prompt", "package", "late", "words", "many leaves", "no leaves", "eta", "negative eta", "scores", "choice"],
)  # fmt: skip
def test_a_wrong_widget_is_an_error_when_the_graph_is_queued(comfy: Any, content: Any, said: str) -> None:
    """Not one of the node's run: there is nothing to wait for."""
    if "rapidocr" in said and has("rapidocr"):
        pytest.skip("rapidocr is installed")
    if "8" in content:
        # What is left is no output that could run without the node.
        content = {key: value for key, value in content.items() if key != "7"}
    with pytest.raises(Exception, match=said) as error:
        comfy.queue(content)
    assert "custom_validation_failed" in str(error.value)


def has(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None


def failed(comfy: Any, content: Any) -> tuple[str, list[str]]:
    """The message of the node that fails, and the nodes that ran before it."""
    prompt, deadline = comfy.queue(content), time.monotonic() + 60
    while time.monotonic() < deadline:
        history = json.loads(comfy.get(f"/history/{prompt}"))
        if prompt in history:
            messages = dict(history[prompt]["status"]["messages"])
            return messages["execution_error"]["exception_message"], messages["execution_error"]["executed"]
        time.sleep(0.05)
    raise AssertionError("it did not fail")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (graph({"prompt": ["9", 0]}), "the prompt is empty"),
        (graph({"prompt": "a cat on a mat"}), "a cat on a mat"),
        (graph({"metadata": "{"}), "metadata is not JSON"),
        (graph(side=512), "draws pictures of 64x64, but the latent is for 512x512"),
    ],
    ids=["prompt over a link", "prompt of another domain", "metadata", "size"],
)
def test_the_rest_is_an_error_before_anything_is_sampled(comfy: Any, content: Any, said: str) -> None:
    message, ran = failed(comfy, content)
    assert said in message and "4" not in ran, (message, ran)


def test_missing_weights_name_the_folder_and_the_input_at_once(nodes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from tmpo_pack.nodes import scoring  # type: ignore[import-not-found]

    asked = []

    def unreachable(url: str, **more: Any) -> None:
        asked.append(url)
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *file: None)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    folder = Path("models") / "tmpo_rewards"
    with pytest.raises(ValueError, match=rf"no route to host.*{folder} and choose them as `model`"):
        scoring.ScoreImages.check_lazy_status("a cat", "pickscore", "(hub)")
    assert len(asked) == 1
    monkeypatch.setattr(scoring, "model_files", lambda: ["(hub)", "mine"])
    monkeypatch.setattr(scoring, "model_path", lambda name: "/nowhere/mine")
    for reward, said in (
        ("clipscore", "model /nowhere/mine: .* does not exist"),
        ("shapes", r"no weights, choose \(hub\)"),
    ):
        with pytest.raises(ValueError, match=said) as error:
            scoring.ScoreImages.check_lazy_status(PROMPT, reward, "mine")
        assert "--reward-models" not in str(error.value)
    # The trainer's own error at loading, should the hub fail later.
    with pytest.raises(ValueError, match=r"put it into .*tmpo_rewards and choose it as `model`"):
        scoring.in_node("x", lambda: raise_(scoring.ConfigError("copy it here and give --reward-models x=PATH, or")))


def raise_(error: Exception) -> None:
    raise error


def test_another_prompt_than_the_pictures_is_worth_a_notice(comfy: Any) -> None:
    def said(content: Any) -> list[str]:
        return comfy.run({**content, "9": node("PrimitiveStringMultiline", value=PROMPT)})["6"]["tmpo_notice"]

    assert said(graph()) == [] and said(graph({"prompt": ["9", 0]})) == []
    (other,) = said(graph({"prompt": "a blue square"}))
    assert "node 2 has 'two red circles', this one 'a blue square'" in other
    linked = graph({"prompt": "a blue square"})
    linked["2"]["inputs"]["text"] = ["9", 0]
    assert "node 2 has 'two red circles'" in said(linked)[0]


def test_prompts_of_a_graph_are_those_of_its_positive_encoders(nodes: Any) -> None:
    from tmpo_pack.nodes import inputs  # type: ignore[import-not-found]

    found = {
        "1": node("CLIPTextEncodeFlux", clip=["9", 0], clip_l="short", t5xxl="long", guidance=3.5),
        "2": node("FluxGuidance", conditioning=["1", 0], guidance=3.5),
        "3": node("BasicGuider", model=["8", 0], conditioning=["2", 0]),
        "4": node("SamplerCustomAdvanced", guider=["3", 0]),
        "5": node("VAEDecode", samples=["4", 0], vae=["9", 2]),
        "6": node("CLIPTextEncode", clip=["9", 0], text="ugly"),
        "7": node("KSampler", positive=["1", 0], negative=["6", 0], latent_image=["4", 0]),
        "8": node("Other", images=["7", 0], text="no prompt"),
        # Values of widgets, and no links.
        "9": node("Painter", images=["5", 0], points=[[1, 2], [3, 4]], positive=[]),
        "10": node("CLIPTextEncode", text=[]),
        "11": node("KSampler", positive=["10", 0]),
    }
    for name, of in (("5", "samples"), ("8", "images"), ("9", "images")):
        assert inputs.prompt_texts(found, name, of) == {"1": "long"}
    assert (
        inputs.prompt_texts({**found, "12": node("VAEDecode", samples=["11", 0], vae=["9", 0])}, "12", "samples") == {}
    )


def test_fewer_pictures_than_asked_for_are_a_notice(nodes: Any) -> None:
    select, images = nodes.diversity.SelectBranches.execute, torch.rand(5, 8, 8, 3)
    scores = scored(images, [0.1, 0.9, 0.5, 0.4, 0.8])
    asked = {"images": images, "beta": 2.0, "seed": 0, "index": 0, "scores": scores}
    few = select(mode="most diverse above a score", count=4, min_score=0.5, **asked)
    assert few.ui == {"tmpo_notice": ["3 pictures instead of 4: only 3 of 5 have at least min_score"]}
    many = select(mode="best by score", count=9, min_score=0.5, **asked)
    assert many.ui == {"tmpo_notice": ["5 pictures instead of 9: the batch has only 5"]} and len(many.result[0]) == 5
    assert select(mode="best by score", count=3, min_score=0.5, **asked).ui == {"tmpo_notice": []}
    # As it was saved before: -1000 was no threshold.
    old = select(mode="most diverse above a score", count=4, min_score=-1000.0, **asked).result[3]
    assert old == select(mode="most diverse", count=4, min_score=0.95, **asked).result[3]
    assert select(mode="most diverse", count=2, min_score=0.0, **{**asked, "scores": None}).result[3].startswith("0, ")


def test_a_choice_is_passed_on_in_its_order(nodes: Any) -> None:
    select, images = nodes.diversity.SelectBranches.execute, torch.rand(5, 8, 8, 3)
    asked = {"images": images, "mode": "by choice", "count": 1, "min_score": 0.0, "beta": 2.0, "seed": 0, "index": 0}
    found = select(**asked, choice="3, 1, 3").result
    assert found[3] == "3, 1" and torch.equal(found[0], images[[3, 1]])
    for choice, said in (
        ("", "choice is empty: choose leaves in the Tree View"),
        ("7", "choose 0 to 4"),
        ("a", "12, 3"),
    ):
        with pytest.raises(ValueError, match=said):
            select(**asked, choice=choice)


def scored(images: Any, values: list[float]) -> Any:
    from tmpo_pack.nodes import images as pictures  # type: ignore[import-not-found]
    from tmpo_pack.nodes import types  # type: ignore[import-not-found]

    return types.Scores({"x": torch.tensor(values)}, ["a"] * len(values), pictures.thumbs(images))


def test_pictures_are_scored_in_chunks_with_progress_and_can_be_interrupted(
    nodes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management as management  # type: ignore[import-not-found]
    import comfy.utils  # type: ignore[import-not-found]
    from tmpo_pack import tmpo_trainer as own  # type: ignore[import-not-found]
    from tmpo_pack.nodes import scoring  # type: ignore[import-not-found]

    done: list[int] = []
    bar = SimpleNamespace(update_absolute=done.append)
    monkeypatch.setattr(comfy.utils, "ProgressBar", lambda total: bar)
    images = torch.rand(70, 8, 8, 3)
    found = scoring.ScoreImages.execute(images, "a", "sharpness", "(hub)").result[0].first()
    assert done == [32, 64, 70]
    whole = scoring.kept_scorer("sharpness", None, 0).score(scoring.pixels(images), ["a"] * 70)
    assert torch.equal(found, whole)

    moves: list[str] = []

    class Moving:
        name = "moving"

        def to(self, device: torch.device) -> None:
            moves.append(device.type)

        def score(self, images: Any, prompts: Any, metadata: Any = None) -> torch.Tensor:
            if len(done) > 4:
                management.interrupt_current_processing()
            return torch.ones(len(images))

    parked = sys.modules[f"{own.__name__}.rewards"].Parked(Moving(), torch.device("meta"))
    moves.clear()
    with pytest.raises(management.InterruptProcessingException):
        scoring.scored(parked, scoring.pixels(torch.rand(170, 8, 8, 3)), ["a"] * 170, None)
    # The weights were moved once, and they are back.
    assert moves == ["meta", "cpu"] and done[-1] < 170
