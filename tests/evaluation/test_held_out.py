"""Evaluations of the tiny model: what is drawn, what is measured, and what is kept of the base."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tmpo_trainer import diversity
from tmpo_trainer.backbones.sd3 import SD3Backbone
from tmpo_trainer.evaluation import appearance, held_out
from tmpo_trainer.evaluation.held_out import Evaluation, EvaluationProtocol, HeldOut, Sampling, evaluate
from tmpo_trainer.evaluation.statistics import interval, summary
from tmpo_trainer.prompts.lists import PromptList


@pytest.fixture(scope="module")
def backbone(load: Callable[..., SD3Backbone]) -> SD3Backbone:
    return load()


PROMPTS = ["a red circle", "two blue squares", "a green triangle"]
LISTED = PromptList("prompts", PROMPTS)


class MeanColours:
    """Features: the mean colour."""

    name = "mean colours"

    def __call__(self, images: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(images.astype(np.float32).mean((1, 2))) - 100


def sample(backbone: SD3Backbone, prompts: list[str], images: int, seed: int, batch: int) -> torch.Tensor:
    how = Sampling(4, seed, 1.5, (32, 32), batch)
    return torch.cat([latents for latents, _ in held_out.sample(backbone, prompts, images, how)])


def test_noise_is_another_for_every_seed_prompt_and_image(
    backbone: SD3Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a velocity of zero what comes out is the noise that went in."""
    monkeypatch.setattr(backbone, "velocity", lambda prompts, guidance: lambda x, sigma: torch.zeros_like(x))
    rows = torch.cat([sample(backbone, PROMPTS, 3, seed=seed, batch=6).flatten(0, 1) for seed in (1, 2)])
    assert rows.shape == (18, 16, 4, 4) and rows.std().item() == pytest.approx(1, abs=0.05)
    # Independent ones are sqrt(2 * 256) apart.
    assert torch.pdist(rows.flatten(1)).min() > 15


def test_samples_are_keyed_by_seed_prompt_and_image(backbone: SD3Backbone) -> None:
    """Not by the batch they come in or the list they are part of: that is what makes evaluations paired."""
    latents = sample(backbone, PROMPTS, 3, seed=1, batch=128)
    assert latents.shape == (3, 3, 16, 4, 4)
    for batch in (1, 3, 6):
        torch.testing.assert_close(sample(backbone, PROMPTS, 3, seed=1, batch=batch), latents, atol=1e-4, rtol=0)
    fewer = sample(backbone, PROMPTS[2:0:-1], 2, seed=1, batch=128)
    torch.testing.assert_close(fewer, latents[[2, 1], :2], atol=1e-4, rtol=0)
    rows = [*latents.flatten(0, 1), *sample(backbone, PROMPTS, 3, seed=2, batch=128).flatten(0, 1)]
    assert torch.pdist(torch.stack(rows).flatten(1)).min() > 1


def test_four_copies_are_one_prompt_with_four_times_the_pictures(backbone: SD3Backbone, red_scorer: Any) -> None:
    """The same pictures and the same interval, wherever in the list the copies are."""

    def found(prompts: list[str], images: int) -> Evaluation:
        how = EvaluationProtocol(
            PromptList("prompts", prompts), [("red", red_scorer)], MeanColours(), images, Sampling(3, 1, 1.5, (32, 32))
        )
        return evaluate(backbone, how, show=3)

    once, copied = found(PROMPTS, 8), found(PROMPTS * 4, 2)
    assert copied.prompts == PROMPTS * 4 and copied.shown == [0, 1, 2]
    merged = copied.scores["red"].reshape(4, 3, 2).transpose(1, 0, 2).reshape(3, 8)
    np.testing.assert_allclose(merged, once.scores["red"], atol=1e-4)
    expected = interval(once.scores["red"], once.prompts)
    assert interval(copied.scores["red"], copied.prompts) == pytest.approx(expected, abs=1e-4)
    assert summary(copied, copied)["gain"]["red"] == {"mean": 0, "low": 0, "high": 0}
    assert expected.high - expected.low > 1e-3


def test_evaluation_measures_each_prompts_own_pictures(backbone: SD3Backbone, red_scorer: Any) -> None:
    seen: list[list[str]] = []

    class Spy:
        name = "spy"

        def score(self, images: np.ndarray, prompts: list[str], metadata: Any = None) -> torch.Tensor:
            seen.append(list(prompts))
            return red_scorer.score(images, prompts)

    done: list[int] = []
    how = EvaluationProtocol(LISTED, [("spy", Spy())], MeanColours(), 3, Sampling(4, 1, 1.5, (32, 32), 6, 4))
    result = evaluate(backbone, how, show=2, progress=done.append)
    latents = sample(backbone, PROMPTS, 3, seed=1, batch=6)
    assert seen == [[prompt for prompt in part for _ in range(3)] for part in (PROMPTS[:2], PROMPTS[2:])]
    assert sum(done) == len(PROMPTS)
    assert result.shown == [0, 2]
    assert result.images.shape == (2, 3, 32, 32, 3) and result.scores["spy"].shape == (3, 3)
    assert result.latent_std == pytest.approx(latents.std().item())
    for p in range(3):
        pictures = backbone.decode(latents[p], 64)
        if p in result.shown:
            assert np.abs(result.images[result.shown.index(p)].astype(int) - pictures).max() <= 1
        for name, values in appearance.measure(pictures, latents[p].numpy()).items():
            assert result.statistics[name][p] == pytest.approx(values, abs=2e-3), name
        assert result.scores["spy"][p] == pytest.approx(red_scorer.score(pictures, PROMPTS).numpy(), abs=1e-3)
        expected = diversity.measure(latents=latents[p], features=MeanColours()(pictures))
        assert list(result.diversity) == list(expected) == list(diversity.MEASURES)
        for name, value in expected.items():
            assert result.diversity[name][p] == pytest.approx(value, abs=1e-4 if name == "LGMD" else 1e-2)


def test_a_score_that_is_no_number_names_scorer_and_prompt(backbone: SD3Backbone) -> None:
    class Broken:
        name = "broken"

        def score(self, images: np.ndarray, prompts: list[str], metadata: Any = None) -> torch.Tensor:
            scores = torch.zeros(len(prompts))
            scores[4] = float("nan")
            return scores

    with pytest.raises(ValueError, match="reward broken gave nan for image 4 of prompt 'two blue squares'"):
        evaluate(
            backbone,
            EvaluationProtocol(LISTED, [("broken", Broken())], MeanColours(), 3, Sampling(4, 1, 1.5, (32, 32), 9, 9)),
        )


def test_scores_may_have_a_gradient(backbone: SD3Backbone) -> None:
    class Learned:
        name = "learned"

        def score(self, images: np.ndarray, prompts: list[str], metadata: Any = None) -> torch.Tensor:
            return torch.ones(len(prompts), requires_grad=True, dtype=torch.float64) * 2

    found = evaluate(
        backbone,
        EvaluationProtocol(LISTED, [("learned", Learned())], MeanColours(), 3, Sampling(4, 1, 1.5, (32, 32), 9, 9)),
    )
    assert (found.scores["learned"] == 2).all()


def test_scorers_that_wait_score_while_the_next_pictures_are_drawn(
    backbone: SD3Backbone, red_scorer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same result, and the same order of progress."""
    drawn, calls = [threading.Event() for _ in range(4)], []
    # Nothing is drawn after the last ones.
    drawn[3].set()

    class Waiting:
        name, waits = "red", True

        def score(self, images: np.ndarray, prompts: list[str], metadata: Any = None) -> torch.Tensor:
            calls.append(prompts[0])
            assert drawn[len(calls)].wait(10), "the next pictures are not being drawn"
            return red_scorer.score(images, prompts)

    def measured(scorer: Any) -> tuple[Evaluation, list[int]]:
        done: list[int] = []
        how = EvaluationProtocol(LISTED, [("red", scorer)], MeanColours(), 3, Sampling(4, 1, 1.5, (32, 32), 3))
        return evaluate(backbone, how, show=2, progress=done.append), done

    expected, done = measured(red_scorer)
    velocity, draws = backbone.velocity, iter(drawn)
    monkeypatch.setattr(backbone, "velocity", lambda *given: (next(draws).set(), velocity(*given))[1])
    got, done_beside = measured(Waiting())
    assert calls == PROMPTS and done_beside == done == [1, 1, 1]
    for name, values in expected.measures.items():
        assert got.measures[name].tolist() == values.tolist()
    assert got.latent_std == expected.latent_std and (got.images == expected.images).all()


# -- what is kept of the base ----------------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every evaluation."""
    found: list[int] = []
    original = held_out.evaluate
    monkeypatch.setattr(held_out, "evaluate", lambda *args, **kwargs: found.append(1) or original(*args, **kwargs))
    return found


def base(backbone: SD3Backbone, file: Path, red_scorer: Any, identity: str = "", **changes: Any) -> Any:
    """The base's evaluation, as a process that has just been started gets it."""
    how = EvaluationProtocol(LISTED, [("red", red_scorer)], MeanColours(), 2, Sampling(3, 1, 1.0, (32, 32)))
    return HeldOut(backbone, replace(how, **changes), file, [identity]).base()


def test_the_base_is_evaluated_again_only_for_other_settings(
    backbone: SD3Backbone, tmp_path: Path, red_scorer: Any, measured: list[int]
) -> None:
    file = tmp_path / "base.npz"
    first, second = (base(backbone, file, red_scorer, batch) for batch in ("", ""))
    assert len(measured) == 1
    for name, values in first.measures.items():
        assert second.measures[name].tolist() == values.tolist()
    assert tuple(second.statistics) == appearance.NAMES
    for name, values in first.statistics.items():
        assert second.statistics[name].tolist() == values.tolist()
    assert second.prompts == first.prompts and second.latent_std == first.latent_std and second.shown == first.shown
    assert (second.images == first.images).all()
    # How many are drawn at a time does not count; all else does.
    base(backbone, file, red_scorer, sampling=Sampling(3, 1, 1.0, (32, 32), batch=2))
    assert len(measured) == 1
    for changes in ({"identity": "another dtype"}, {"images": 3}, {"sampling": Sampling(3, 2, 1.0, (32, 32))},
                    {"sampling": Sampling(3, 1, 1.0, (32, 32), solver="ab2")},
                    {"prompts": PromptList("prompts", PROMPTS[:2])}):  # fmt: skip
        base(backbone, file, red_scorer, **changes)
    assert len(measured) == 6


def test_a_base_whose_copies_had_the_same_noise_is_not_taken(
    backbone: SD3Backbone, tmp_path: Path, red_scorer: Any, measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = PromptList("prompts", PROMPTS * 2)
    with monkeypatch.context() as earlier:
        earlier.setattr(held_out, "ordinals", lambda prompts: [0] * len(prompts))
        base(backbone, tmp_path / "base.npz", red_scorer, prompts=copies)
        base(backbone, tmp_path / "once.npz", red_scorer)
    base(backbone, tmp_path / "base.npz", red_scorer, prompts=copies)
    assert len(measured) == 3
    # A list without copies has the noise that it had.
    base(backbone, tmp_path / "once.npz", red_scorer)
    assert len(measured) == 3


def test_a_file_that_lacks_a_measure_is_not_taken(
    backbone: SD3Backbone,
    tmp_path: Path,
    red_scorer: Any,
    measured: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As those do that an earlier version wrote, with diversities under other names."""
    file = tmp_path / "base.npz"
    base(backbone, file, red_scorer)
    with np.load(file) as stored:
        arrays = {name: stored[name] for name in stored}
    lgmd, cosine = arrays.pop("diversity/LGMD"), arrays.pop("diversity/cosine diversity")
    np.savez_compressed(file, **arrays, lgmd=lgmd, cosine=cosine)
    assert (base(backbone, file, red_scorer).diversity["LGMD"] == lgmd).all() and len(measured) == 2
    monkeypatch.setitem(diversity.MEASURES, "spread", diversity.Measure(lambda latents: latents.std(), "latents"))
    assert base(backbone, file, red_scorer).diversity["spread"].shape == (3,) and len(measured) == 3
    base(backbone, file, red_scorer)
    assert len(measured) == 3
    capsys.readouterr()
    np.savez_compressed(file, **{name: array for name, array in arrays.items() if "statistics" not in name})
    assert tuple(base(backbone, file, red_scorer).statistics) == appearance.NAMES and len(measured) == 4
    assert capsys.readouterr().err.startswith("tmpo_trainer: base.npz is from another version (")


def test_what_the_limit_needs_is_measured_and_kept(
    backbone: SD3Backbone, tmp_path: Path, red_scorer: Any, measured: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Distances between a prompt's pictures, and a scorer's factors; a file without them is replaced, with a notice."""

    class Judged:
        name, score = "red", red_scorer.score

        def factors(self, images: np.ndarray, prompts: list[str]) -> dict[str, np.ndarray]:
            return {"brightness": images.mean((1, 2, 3)), "length": np.array([float(len(text)) for text in prompts])}

    file = tmp_path / "base.npz"
    first = base(backbone, file, red_scorer, scorers=[("red", Judged())])
    assert first.distances is not None and first.distances.shape == (3, 2, 2)
    assert first.distances[:, 0, 1] == pytest.approx(first.diversity["cosine diversity"], abs=1e-5)
    assert first.factors["brightness"][0] == pytest.approx(first.images[0].mean((1, 2, 3)))
    assert first.factors["length"].tolist() == [[len(text)] * 2 for text in PROMPTS]
    again = base(backbone, file, red_scorer, scorers=[("red", Judged())])
    assert (again.distances == first.distances).all() and (again.factors["length"] == first.factors["length"]).all()
    assert len(measured) == 1 and "base.npz" not in capsys.readouterr().err
    with np.load(file) as stored:
        arrays = {name: stored[name] for name in stored if name != "distances"}
    np.savez_compressed(file, **arrays)
    assert base(backbone, file, red_scorer, scorers=[("red", Judged())]).distances is not None and len(measured) == 2
    assert "base.npz is from another version (distances" in capsys.readouterr().err


def test_a_damaged_file_is_replaced(
    backbone: SD3Backbone, tmp_path: Path, red_scorer: Any, measured: list[int]
) -> None:
    """Whatever numpy and zipfile raise for it: a cut file, compressed data that are none, another kind of file."""
    file = tmp_path / "base.npz"
    base(backbone, file, red_scorer)
    good = file.read_bytes()
    first = good.index(b"key.npy") + len(b"key.npy") + 20
    for damaged in (
        good[: len(good) // 2],
        good[:first] + bytes([good[first] ^ 255]) + good[first + 1 :],
        b"\x93NUMPY",
    ):
        file.write_bytes(damaged)
        base(backbone, file, red_scorer)
    with file.open("wb") as out:
        np.save(out, np.zeros(3))
    base(backbone, file, red_scorer)
    assert len(measured) == 5
    base(backbone, file, red_scorer)
    assert len(measured) == 5


def test_the_solver_draws_other_pictures_of_the_same_kind(backbone: SD3Backbone) -> None:
    euler = Sampling(6, 1, 1.0, (32, 32))
    pairs = [held_out.sample(backbone, PROMPTS[:1], 2, how) for how in (euler, replace(euler, solver="ab2"))]
    (first, _), (second, _) = (next(pair) for pair in pairs)
    assert 1e-3 < (first - second).std() < first.std() / 2
    assert [replace(euler, solver=solver).about for solver in ("euler", "ab2")] == ["6 steps", "6 steps of ab2"]
