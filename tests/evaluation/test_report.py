"""The report of a run and the table of `evaluate`, on made-up figures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tmpo_trainer.diversity import MEASURES, Measure
from tmpo_trainer.evaluation import report
from tmpo_trainer.evaluation.held_out import Evaluation


def made(scores: dict[str, float], diversity: float, latent_std: float = 1.0, prompts: int = 3) -> Evaluation:
    """Figures that are the same for every prompt, of 2 pictures each."""
    return Evaluation(
        prompts=[f"prompt {i}" for i in range(prompts)],
        scores={name: np.full((prompts, 2), value) for name, value in scores.items()},
        diversity={name: np.full(prompts, diversity) for name in MEASURES},
        latent_std=latent_std,
        shown=[0, prompts - 1],
        images=np.zeros((2, 2, 16, 16, 3), np.uint8),
        statistics={"contrast": np.resize([0.25, 0.75], (prompts, 2)) * latent_std},
    )


def line(update: int) -> dict[str, float]:
    return {"update": update, "reward/red": 0.1 * update, "lgmd": 0.1, "latent_std": 1.0, "ratio_mean": 1.0}


@pytest.mark.parametrize("evaluated", [False, True])
def test_what_a_report_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluated: bool) -> None:
    """A row per score and measure, also of a measure that has just been added; the verdict; the pictures."""
    monkeypatch.setitem(MEASURES, "largest", Measure(lambda latents: latents.max(), "latents"))
    base, trained = made({"red": 0.5}, 0.4), made({"red": 0.75}, 0.2, latent_std=1.1)
    gain = {"red": {"mean": 0.1, "low": 0.05, "high": 0.2}}
    evaluations = [{"update": 2, "gain": gain}] if evaluated else []
    metrics = [line(update) for update in range(1, 5)]
    checks = report.write_report(tmp_path, base, trained, metrics, evaluations, ["red"], ["How.", "Made."], "red")
    assert list(checks.values()) == [True, False, False, True]
    text = (tmp_path / "report.md").read_text()
    rows = {row.split(" | ")[0].removeprefix("| "): row for row in text.splitlines() if row.startswith("| ")}
    assert list(rows) == ["held-out prompts", "red", *MEASURES, "latent standard deviation", "drift", "contrast"]
    assert rows["red"] == "| red | 0.500 | 0.750 | +0.250 [+0.250, +0.250] |"
    assert rows["largest"] == "| largest | 0.400 | 0.200 | -0.200 [-0.200, -0.200] |"
    assert rows["latent standard deviation"] == "| latent standard deviation | 1.000 | 1.100 | +10.0% |"
    # Pictures with 1.1 times as much contrast differ 1.1 times as much in it.
    assert rows["contrast"] == (
        "| contrast | 0.500 | 0.550 | +0.050 | +0.14 [+0.14, +0.14] | 1.10 [1.10, 1.10] | 1.10 [1.10, 1.10] |"
    )
    assert "How.\nMade." in text and "- [x] red rose" in text and "- [ ] LGMD at least" in text
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["prompts"] == 3 and content["verdict"] == checks
    assert content["drift"]["contrast"]["slope"] == {key: pytest.approx(1.1) for key in ("mean", "low", "high")}
    assert content["gain"]["Vendi score"] == {key: pytest.approx(-0.2) for key in ("mean", "low", "high")}
    # A panel more for the evaluations during training.
    panels = Image.open(tmp_path / "curves.png").width / 396
    assert round(panels) == (4 if evaluated else 3)
    assert Image.open(tmp_path / "samples.png").size[0] > 200


def test_a_single_prompt_has_a_report(tmp_path: Path) -> None:
    """Its interval has no ends, in the table as in the figures of evaluations on the way."""
    base, trained = made({"red": 0.5}, 0.4, prompts=1), made({"red": 0.75}, 0.2, prompts=1)
    gain = {"red": {"mean": 0.1, "low": None, "high": None}}
    metrics = [line(update) for update in range(1, 5)]
    report.write_report(tmp_path, base, trained, metrics, [{"update": 2, "gain": gain}], ["red"], ["How."], "red")
    assert "| red | 0.500 | 0.750 | +0.250 [-inf, +inf] |" in (tmp_path / "report.md").read_text()


def test_a_report_shows_the_error_of_the_velocity(tmp_path: Path) -> None:
    """As a curve, for methods that have one; and the warning, if it has risen."""
    base, trained = made({"red": 0.5}, 0.4), made({"red": 0.75}, 0.2)
    for rise, warned in ((1.9, False), (2.1, True)):
        metrics = [line(u) | {"velocity_mse": 0.25 * (rise if u > 20 else 1)} for u in range(1, 41)]
        report.write_report(tmp_path, base, trained, metrics, [], ["red"], ["How."], "red")
        assert round(Image.open(tmp_path / "curves.png").width / 396) == 4
        text = (tmp_path / "report.md").read_text()
        assert ("is 2.1 times that of the first 20 updates" in text) == warned == ("velocity_mse" in text)


def test_intervals_of_two_lists_of_prompts() -> None:
    """Every score is on its own list, diversity on the last; with two models the last row is their difference."""
    models = {
        "base": [made({"task": 0.5}, 9.0), made({"taste": 0.25}, 0.4, prompts=5)],
        "LoRA": [made({"task": 0.75}, 9.0), made({"taste": 0.125}, 0.2, prompts=5)],
    }
    intervals = report.Intervals.of(models)
    assert intervals.models["base"]["task"] == (0.5, 0.5, 0.5)
    lines = intervals.markdown().splitlines()
    assert lines[0] == f"|  | task | taste | {' | '.join(MEASURES)} |"
    assert lines[2].startswith("| base | 0.500 [0.500, 0.500] | 0.250 [0.250, 0.250] | 0.400 [")
    assert lines[4].startswith("| change, paired | +0.250 [+0.250, +0.250] | -0.125 [-0.125, -0.125] | -0.200 [")
    content = intervals.content()
    assert content["gain"]["task"] == {"mean": 0.25, "low": 0.25, "high": 0.25}
    for parts in models.values():
        parts[0].prompts = ["a"] * len(parts[0].prompts)
    copies = report.Intervals.of(models)
    assert copies.gain["task"].low == -np.inf and copies.gain["taste"] == intervals.gain["taste"]
    alone = report.Intervals.of({"base": models["base"]})
    assert "gain" not in alone.content() and len(alone.markdown().splitlines()) == 3


def test_running_mean() -> None:
    assert report.running_mean(np.arange(6.0), 3).tolist() == [0.5, 1.5, 2.5, 3.5, 4.5]
    assert report.running_mean(np.arange(3.0), 12).tolist() == [0, 1, 2]
