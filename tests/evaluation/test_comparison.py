"""The figures, tables and pictures of `compare`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from tmpo_trainer.diversity import MEASURES, Measure
from tmpo_trainer.evaluation import comparison
from tmpo_trainer.evaluation.held_out import Evaluation


def measured(score: float, cosine: float, updates: int = 0, timed: bool = True) -> comparison.Measured:
    """Three prompts that differ, three pictures. An update: two prompts, 100 evaluations in the rollout, 10 in the replay."""
    evaluation = Evaluation(
        prompts=["a", "b", "c"],
        scores={"right": score * np.array([[0.5] * 3, [1] * 3, [1.5] * 3])},
        diversity={name: np.full(3, cosine) for name in MEASURES} | {"LGMD": np.array([0.1, 0.2, 0.3])},
        latent_std=0.5 * (1 + score),
        shown=[0, 2],
        images=np.zeros((2, 3, 8, 8, 3), np.uint8),
        statistics={"saturation": 0.5 + (0.2 - score / 10) * np.array([[1, 0, -1], [2, 0, -2], [3, 0, -3]])},
    )
    line = {
        "evaluations/rollout": 100.0, "evaluations/replay": 10.0, "seconds": {"total": 2.0}, "reward/right": score,
    }  # fmt: skip
    return comparison.Measured(evaluation, comparison.Course([line] * updates, 2, timed))


def test_figures_by_hand() -> None:
    base = measured(0.0, 0.4)
    found = comparison.figures([measured(0.2, 0.3, 5), measured(0.4, 0.3, 5)], base.evaluation)
    assert found["right"]["mean"] == pytest.approx(0.3) and found["right"]["spread"] == pytest.approx(0.2 / 2**0.5)
    # Means of three draws of .15, .3, .45: one in 27 is the least.
    assert found["gain"]["right"] == pytest.approx((0.3, 0.15, 0.45))
    assert found["gain"]["cosine diversity"][0] == pytest.approx(-0.1)
    assert found["latent std, change"]["mean"] == pytest.approx(0.3)
    assert (
        found["network evaluations/update"]["mean"] == 2 * (100 + 2 * 10)
        and found["network evaluations"]["mean"] == 5 * 240
    )
    assert found["s/update"]["mean"] == 2 and found["updates"]["mean"] == 5
    text = comparison.figures_table(
        {"base": comparison.figures([base], base.evaluation), "x": found}, ["right", "LGMD"]
    )
    assert text.splitlines()[2] == "| base |  |  |  |  | 0.000 | 0.200 |  |"
    assert text.splitlines()[3] == "| x | 2 | 5 | 240 | 2.00 | 0.300 ± 0.141 | 0.200 ± 0.000 | +30.0% ± 14.1% |"
    beside = comparison.figures([measured(0.2, 0.3, 5, False), measured(0.4, 0.3, 5, False)], base.evaluation)
    assert not {"seconds", "s/update"} & beside.keys()
    beside = comparison.figures_table({"x": beside}, ["right", "LGMD"])
    assert beside.splitlines()[2] == "| x | 2 | 5 | 240 | 0.300 ± 0.141 | 0.200 ± 0.000 | +30.0% ± 14.1% |"
    assert "| s per update |" in text and "| s per update |" not in beside


def test_a_single_prompt_has_no_interval(tmp_path: Path) -> None:
    """It says nothing about others: infinite in the table, null in JSON, which has no infinity."""
    runs = {"base": [measured(0.0, 0.4)], "x": [measured(0.2, 0.3, 5)]}
    for run in (runs["base"][0], runs["x"][0]):
        found = run.evaluation
        found.prompts, found.shown, found.images = ["a"], [0], found.images[:1]
        found.scores = {"right": found.scores["right"][:1]}
        found.diversity = {name: values[:1] for name, values in found.diversity.items()}
        found.statistics = {name: values[:1] for name, values in found.statistics.items()}
    comparison.write(tmp_path, runs, {}, [["x"]])
    assert "| x | +0.100 [-inf, +inf] |" in (tmp_path / "table.md").read_text()
    gain = json.loads((tmp_path / "table.json").read_text())["arms"]["x"]["gain"]["right"]
    assert gain == {"mean": pytest.approx(0.1), "low": None, "high": None}


def test_copies_of_a_prompt_are_one_prompt() -> None:
    base, run = measured(0.0, 0.4), measured(0.2, 0.3, 5)
    assert np.isfinite(comparison.figures([run], base.evaluation)["gain"]["right"].low)
    base.evaluation.prompts = run.evaluation.prompts = ["a"] * len(base.evaluation.prompts)
    assert comparison.figures([run], base.evaluation)["gain"]["right"].low == -np.inf


def test_the_limit_is_a_table_and_a_curve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row per arm, from the base's own pictures; without their distances, as of an earlier version, nothing."""
    runs = {"base": [measured(0.4, 0.4)], "x": [measured(0.4, 0.3, 5), measured(0.4, 0.3, 5)]}
    comparison.write(tmp_path, runs, {}, [["x"]])
    assert "limit" not in capsys.readouterr().out and (tmp_path / "pareto.png").exists()
    base = runs["base"][0].evaluation
    base.scores = {"right": base.scores["right"] - np.array([0.3, 0.2, 0.1])}
    base.distances = np.full((3, 3, 3), 0.4)
    comparison.write(tmp_path, runs, {}, [["x"]])
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| x | cosine diversity |")]
    assert "| 0.4 | 0.3 | 25.0% [25.0%, 25.0%] |" in row and row in (tmp_path / "table.md").read_text()
    cost = json.loads((tmp_path / "table.json").read_text())["limit"]["models"]["x"]["cosine diversity"]
    assert cost["lost"]["mean"] == pytest.approx(0.25) and cost["excess"] is None


def test_a_new_measure_needs_its_entry_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a column in both tables and a panel in the picture."""
    monkeypatch.setitem(MEASURES, "largest", Measure(lambda latents: latents.max(), "latents"))
    comparison.write(
        tmp_path, {"base": [measured(0.0, 0.4)], "x": [measured(0.2, 0.3, 5)]}, {"evaluations": 1e4}, [["x"]], ["y"]
    )
    text = (tmp_path / "table.md").read_text()
    assert f"| {' | '.join(MEASURES)} | latent std |" in text and "| largest, change |" in text
    assert "Budget: 10,000 network evaluations per run." in text and "Failed and not in the table: y." in text
    arm = json.loads((tmp_path / "table.json").read_text())["arms"]["x"]
    assert "| x | +0.00, 0.90, 0.90 |" in text and arm["drift"][0]["saturation"]["slope"]["high"] == pytest.approx(0.9)
    assert arm["largest"]["mean"] == pytest.approx(0.3) and arm["gain"]["largest"]["mean"] == pytest.approx(-0.1)
    width, height = Image.open(tmp_path / "pareto.png").size
    assert width / height == pytest.approx(1.1 * (len(MEASURES) + 1) + 0.75)


def test_arms_along_a_front_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the front, whatever that of the table; a failed arm is left out. The limit does not stretch the axes."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    base = measured(0.4, 0.4)
    base.evaluation.scores = {"right": base.evaluation.scores["right"] - np.array([0.3, 0.2, 0.1])}
    base.evaluation.distances = np.full((3, 3, 3), 0.4)
    runs = {"base": [base], "x": [measured(0.2, 0.3, 5)], "z": [measured(0.2, 0.2, 5)], "y": [measured(0.22, 0.1, 5)]}
    comparison.write(tmp_path, runs, {}, [["x"], ["y", "lost", "z"], ["u"]], ["lost"])
    pareto, curves = figures
    panel = pareto.axes[list(MEASURES).index("cosine diversity")]
    lines = {str(line.get_label()): np.array(line.get_xydata()) for line in panel.get_lines()}
    assert list(lines) == ["base", "x", "y, z", "limit"]
    assert lines["y, z"] == pytest.approx(np.array([[0.1, 0.22], [0.2, 0.2]]))
    assert lines["limit"][:, 1].max() > 0.29 > panel.get_ylim()[1]
    (legend,) = pareto.legends
    assert [text.get_text() for text in legend.get_texts()] == list(lines)
    assert [line.get_label() for line in curves.axes[0].get_lines()] == ["x", "y", "z"]
    one, two = curves.axes[0].get_lines()[1:]
    assert one.get_color() == two.get_color() and one.get_linestyle() != two.get_linestyle()


def test_many_arms_fit_and_runs_beside_each_other_are_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every arm is in the legends and looks different; one update is a point."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    runs = {"base": [measured(0.0, 0.4)]} | {f"arm-{i}": [measured(0.1 + i / 100, 0.3, 1, False)] for i in range(45)}
    comparison.write(tmp_path, runs, {}, [[name] for name in runs if name != "base"])
    pareto, curves = figures
    assert len(pareto.axes) == len(MEASURES) and len(curves.axes) == 1
    assert "Without seconds" in (tmp_path / "table.md").read_text()
    lines = curves.axes[0].get_lines()
    assert len({(str(line.get_color()), line.get_linestyle()) for line in lines}) == 45
    assert {line.get_marker() for line in lines} == {"o"}
    for figure in figures:
        (legend,) = figure.legends
        figure.draw_without_rendering()
        assert legend.get_window_extent().height < figure.bbox.height
