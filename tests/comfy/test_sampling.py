"""The tree sampler's numbers, in a ComfyUI within this process: against stock Euler, the trainer's rollout and diffusers."""

from __future__ import annotations

import gc
import math
import os
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tmpo_trainer import objectives, rewards, tree
from tmpo_trainer.commands import loading
from tmpo_trainer.lora import attach
from tmpo_trainer.settings import discovery
from tmpo_trainer.settings.config import TrainConfig

COMFYUI = os.environ.get("COMFYUI_PATH")
pytestmark = pytest.mark.skipif(not COMFYUI, reason="COMFYUI_PATH names no checkout of ComfyUI")
REPOSITORY = Path(__file__).parents[2]
PROMPTS = ("two red circles", "a blue square left of a green triangle")
STEPS, BRANCHES, SEED = 10, (1, 4, 5), 5
SHIFT, SCALE = 0.0609, 1.5305


@pytest.fixture(scope="module")
def pack(nodes: Any) -> Any:
    """The nodes, and the demo model."""
    nodes.model, nodes.clip, nodes.vae = (
        nodes.demo_model.load_model(),
        nodes.demo_model.load_clip(),
        nodes.demo_model.load_vae(),
    )
    return nodes


def encode(pack: Any, prompt: str) -> Any:
    return pack.clip.encode_from_tokens_scheduled(pack.clip.tokenize(prompt))


def batch(pack: Any, prompts: tuple[str, ...]) -> Any:
    """A conditioning with one row per prompt."""
    parts = [encode(pack, prompt)[0] for prompt in prompts]
    pooled = torch.cat([part[1]["pooled_output"] for part in parts])
    return [[torch.cat([part[0] for part in parts]), {"pooled_output": pooled}]]


def empty(count: int = 1) -> dict[str, Tensor]:
    return {"samples": torch.zeros(count, 16, 8, 8)}


def sample(
    pack: Any,
    prompts: tuple[str, ...] = PROMPTS[:1],
    latent: Any = None,
    cfg: float = 1.0,
    model: Any = None,
    **changes: Any,
) -> tuple[Tensor, Any]:
    settings = {
        "branch_steps": ", ".join(map(str, BRANCHES)),
        "branching": 3,
        "kernel": "cps",
        "eta": 0.7,
        "max_batch": 0,
    }
    settings |= changes
    found = pack.sampling.TreeSamplerNode.execute(
        model or pack.model, batch(pack, prompts), batch(pack, ("a green triangle",) * len(prompts)),
        latent or empty(len(prompts)), SEED, STEPS, cfg, "normal", **settings,
    ).result  # fmt: skip
    return found[0]["samples"], found[1]


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_without_noise_it_is_stock_euler_to_the_bit(pack: Any, cfg: float) -> None:
    leaves, _ = sample(pack, branch_steps="2, 8", eta=0.0, cfg=cfg)
    latent = empty()["samples"]
    noise = pack.comfy.sample.prepare_noise(latent, SEED)
    # Both have as many rows at each step, because matrix products depend on their sizes.
    positive, negative = batch(pack, PROMPTS[:1]), batch(pack, ("a green triangle",))
    stock = pack.comfy.sample.sample(
        pack.model, noise, STEPS, cfg, "euler", "normal", positive, negative, latent, seed=SEED, disable_pbar=True
    )
    one, _ = sample(pack, branch_steps="2", branching=1, eta=0.0, cfg=cfg)
    assert torch.equal(one, stock)
    torch.testing.assert_close(leaves, stock.expand(9, -1, -1, -1), atol=1e-5, rtol=0)


def test_ab2_is_stock_ipndm_v_of_order_two(pack: Any) -> None:
    """Without branches, and with branches without noise: these steps are Euler's, and the next one starts a new history.

    The sigmas do not end in 0, because ipndm_v takes a step to sigma 0 by Euler and ab2 takes it like any other. In few steps
    that is nearer to the exact picture.
    """
    guider = pack.comfy.samplers.CFGGuider(pack.model)
    guider.set_conds(batch(pack, PROMPTS[:1]), batch(pack, PROMPTS[:1]))
    sigmas = pack.comfy.samplers.calculate_sigmas(pack.model.get_model_object("model_sampling"), "normal", STEPS)[:-1]
    noise = pack.sampling.Seeded(SEED)
    samplers = {"ab2": pack.comfy.samplers.ksampler("ipndm_v", {"max_order": 2})}
    samplers["euler"] = pack.comfy.samplers.sampler_object("euler")

    def stock(*stretches: tuple[str, int, int]) -> Tensor:
        """Stock samplers one after another, each from one place in the sigmas to another."""
        latent, start = empty()["samples"], noise.generate_noise(empty())
        for name, first, last in stretches:
            latent = guider.sample(
                start, latent, samplers[name], sigmas[first : last + 1], seed=SEED, disable_pbar=True
            )
            start = torch.zeros_like(latent)
        return latent

    def ours(branch_steps: str, solver: str) -> Tensor:
        return pack.sampling.TreeSamplerAdvanced.execute(
            noise, guider, sigmas, empty(), branch_steps, 1, "cps", 0.0, 0, solver
        ).result[0]["samples"]

    whole, broken = ours("1", "ab2"), ours("1, 4", "ab2")
    torch.testing.assert_close(whole, stock(("ab2", 0, 9)), atol=1e-5, rtol=0)
    torch.testing.assert_close(broken, stock(("ab2", 0, 3), ("euler", 3, 4), ("ab2", 4, 9)), atol=1e-4, rtol=0)
    for other in (whole, ours("1, 4", "euler")):
        assert (broken - other).abs().max() > 0.01
    with pytest.raises(ValueError, match="solver: heun is not in the list"):
        ours("1", "heun")


@pytest.mark.parametrize(
    ("kernel", "solver"), [("cps", "euler"), ("flow_sde", "euler"), ("dance", "euler"), ("cps", "ab2")]
)
def test_leaves_are_those_of_the_trainers_rollout(pack: Any, kernel: str, solver: str) -> None:
    """The same weights through diffusers, the same noise: text encoders, network and kernels agree. So does the VAE."""
    leaves, found = sample(pack, PROMPTS, kernel=kernel, solver=solver)
    backbone = loading.load_model(TrainConfig(max_sequence_length=0), torch.device("cpu"))
    start = pack.comfy.sample.prepare_noise(empty(2)["samples"], SEED)
    sources = [tree.keyed_noise((SEED, p), (16, 8, 8)) for p in range(2)]

    def noise(step: int, path: tree.NodePath) -> Tensor:
        root, prompt = divmod(path[0], 2)
        return start[prompt] if step == 0 and root == 0 else sources[prompt](step, (root, *path[1:]))

    plan = tree.TreePlan.tmpo(STEPS, BRANCHES, 3).forest(2)
    run = tree.rollout(
        backbone.velocity(PROMPTS, 1.0),
        noise,
        backbone.sigmas(STEPS, 64, 64),
        plan,
        kernel=kernel,  # type: ignore[arg-type]
        eta=0.7,
        solver=solver,  # type: ignore[arg-type]
    )
    scaled = (leaves - SHIFT) * SCALE
    torch.testing.assert_close(scaled, run.leaves, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.log_probs, run.log_probs, atol=1e-4, rtol=0)
    assert found.evaluations == plan.rollout_evaluations and found.plan.widths == plan.widths
    pictures = (pack.vae.decode(leaves) * 255).round()
    difference = (pictures - torch.from_numpy(backbone.decode(run.leaves, 64)).float()).abs()
    assert difference.max() <= 2


def test_chunks_and_batches_of_prompts_change_nothing(pack: Any) -> None:
    whole, _ = sample(pack, PROMPTS)
    for most in (2, 5, 8):
        torch.testing.assert_close(sample(pack, PROMPTS, max_batch=most)[0], whole, atol=1e-5, rtol=0)
    # Prompt p of a batch has row l * 2 + p. Taken from the batch, as by Latent From Batch, it keeps all its noise.
    for place, prompt in enumerate(PROMPTS):
        taken = {**empty(), "batch_index": [place]}
        torch.testing.assert_close(whole[place::2], sample(pack, (prompt,), taken)[0], atol=1e-5, rtol=0)
    # Alone its noise is another (that of the batch's first row), so start from its own.
    start = pack.comfy.sample.prepare_noise(empty(2)["samples"], SEED)
    noise = SimpleNamespace(seed=SEED, generate_noise=lambda latent: start[:1])
    guider = pack.comfy.samplers.CFGGuider(pack.model)
    guider.set_conds(batch(pack, PROMPTS[:1]), batch(pack, PROMPTS[:1]))
    sigmas = pack.comfy.samplers.calculate_sigmas(pack.model.get_model_object("model_sampling"), "normal", STEPS)
    alone = pack.sampling.TreeSamplerAdvanced.execute(
        noise, guider, sigmas, empty(), "1, 4, 5", 3, "cps", 0.7, 0
    ).result
    torch.testing.assert_close(whole[0::2], alone[0]["samples"], atol=1e-5, rtol=0)
    assert (whole[0::2] - whole[1::2]).abs().max() > 0.1


def test_a_leaf_alone_is_the_same(pack: Any) -> None:
    """The path of one leaf run by itself, one node after another."""
    leaves, found = sample(pack)
    paths = found.paths()
    backbone = loading.load_model(TrainConfig(max_sequence_length=0), torch.device("cpu"))
    velocity = backbone.velocity(PROMPTS[:1], 1.0)
    start = pack.comfy.sample.prepare_noise(empty()["samples"], SEED)
    source = tree.keyed_noise((SEED, 0), (16, 8, 8))
    for leaf in (0, 7, 26):
        path = paths[leaf]

        def noise(step: int, walked: tree.NodePath, path: tree.NodePath = path) -> Tensor:
            if step == 0:
                return start[0] if path[0] == 0 else source(0, path[:1])
            return source(step, path[: len(walked)])

        plan = tree.TreePlan(STEPS, 1, {4: 1, 5: 1})
        alone = tree.rollout(velocity, noise, found.sigmas, plan, kernel="cps", eta=0.7).leaves
        torch.testing.assert_close((leaves[leaf] - SHIFT) * SCALE, alone[0], atol=1e-4, rtol=0)


def test_masked_regions_stay_and_an_image_can_be_the_start(pack: Any) -> None:
    """Where the mask is 0, every leaf is the latent given; with eta 0 it is stock Euler with that mask."""
    given = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 64, 64)
    mask[:, :, 32:] = 1
    latent = {"samples": given, "noise_mask": mask}
    for solver in ("euler", "ab2"):
        leaves, _ = sample(pack, latent=latent, solver=solver)
        assert leaves.shape == (27, 16, 8, 8)
        torch.testing.assert_close(leaves[..., :3], given.expand(27, -1, -1, -1)[..., :3], atol=1e-5, rtol=0)
        assert leaves[..., 5:].std(0).mean() > 0.05
    one, _ = sample(pack, latent=latent, branch_steps="2", branching=1, eta=0.0)
    positive, negative = batch(pack, PROMPTS[:1]), batch(pack, ("a green triangle",))
    noise = pack.comfy.sample.prepare_noise(given, SEED)
    stock = pack.comfy.sample.sample(
        pack.model, noise, STEPS, 1.0, "euler", "normal", positive, negative, given, noise_mask=mask, seed=SEED,
        disable_pbar=True,
    )  # fmt: skip
    assert torch.equal(one, stock)


def test_partial_sigmas(pack: Any) -> None:
    """The end of a schedule on a given latent, as after a first sampler."""
    given = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    sigmas = pack.comfy.samplers.calculate_sigmas(pack.model.get_model_object("model_sampling"), "normal", STEPS)[4:]
    guider = pack.comfy.samplers.CFGGuider(pack.model)
    guider.set_conds(batch(pack, PROMPTS[:1]), batch(pack, PROMPTS[:1]))
    noise = pack.sampling.Seeded(SEED)
    tree_leaves = pack.sampling.TreeSamplerAdvanced.execute(
        noise, guider, sigmas, {"samples": given}, "2", 1, "cps", 0.0, 0
    ).result[0]["samples"]
    stock = guider.sample(
        noise.generate_noise({"samples": given}), given, pack.comfy.samplers.sampler_object("euler"), sigmas, seed=SEED,
        disable_pbar=True,
    )  # fmt: skip
    assert torch.equal(tree_leaves, stock)


def test_as_a_sampler_object(pack: Any) -> None:
    """SamplerCustomAdvanced with our SAMPLER gives the same leaves."""
    leaves, _ = sample(pack)
    sampler = pack.sampling.TreeSamplerObject.execute("1, 4, 5", 3, "cps", 0.7, 0).result[0]
    guider = pack.comfy.samplers.CFGGuider(pack.model)
    guider.set_conds(batch(pack, PROMPTS[:1]), batch(pack, PROMPTS[:1]))
    sigmas = pack.comfy.samplers.calculate_sigmas(pack.model.get_model_object("model_sampling"), "normal", STEPS)
    latent = empty()["samples"]
    noise = pack.comfy.sample.prepare_noise(latent, SEED)
    found = guider.sample(noise, latent, sampler, sigmas, seed=SEED, disable_pbar=True)
    torch.testing.assert_close(found, leaves, atol=1e-6, rtol=0)


def test_interrupted_and_run_again(pack: Any) -> None:
    import comfy.model_management as management  # type: ignore[import-not-found]

    whole, _ = sample(pack)
    calls = 0
    original = management.throw_exception_if_processing_interrupted

    def interrupt() -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise management.InterruptProcessingException

    management.throw_exception_if_processing_interrupted = interrupt
    try:
        with pytest.raises(management.InterruptProcessingException):
            sample(pack)
    finally:
        management.throw_exception_if_processing_interrupted = original
    assert torch.equal(sample(pack)[0], whole)


def test_memory_is_asked_for_the_largest_batch(pack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    original = type(pack.model.model).memory_required

    def memory_required(self: Any, shape: Any, **more: Any) -> Any:
        asked.append(shape[0])
        return original(self, shape, **more)

    monkeypatch.setattr(type(pack.model.model), "memory_required", memory_required)
    sample(pack)
    assert max(asked) == 2 * 27
    asked.clear()
    sample(pack, max_batch=9)
    assert max(asked) == 2 * 9


def test_a_model_that_is_no_flow_is_refused(pack: Any) -> None:
    """Stable Diffusion 1 and XL predict noise: their sampling is another class."""
    import comfy.model_sampling as kinds  # type: ignore[import-not-found]

    other = pack.model.clone()

    class Other(kinds.ModelSamplingDiscrete, kinds.EPS):
        pass

    other.add_object_patch("model_sampling", Other(pack.model.model.model_config))
    with pytest.raises(ValueError, match=r"flow-matching model .* use KSampler"):
        sample(pack, model=other)


@pytest.mark.parametrize("kind", ["EasyCacheNode", "LazyCacheNode"])
def test_a_cache_from_step_to_step_is_refused(pack: Any, kind: str) -> None:
    """Before the model is loaded, and in a sampler of ComfyUI's own."""
    from comfy_extras import nodes_easycache  # type: ignore[import-not-found]

    cached = getattr(nodes_easycache, kind).execute(pack.model, 0.2, 0.15, 0.95, False).result[0]
    with pytest.raises(ValueError, match=r"EasyCache and LazyCache compare a call .* without them"):
        sample(pack, model=cached)
    guider = pack.comfy.samplers.CFGGuider(cached)
    guider.set_conds(batch(pack, PROMPTS[:1]), batch(pack, PROMPTS[:1]))
    sampler = pack.sampling.TreeSamplerObject.execute("1, 2", 3, "cps", 0.7, 0).result[0]
    latent = empty()["samples"]
    with pytest.raises(ValueError, match="EasyCache and LazyCache"):
        guider.sample(latent + 1, latent, sampler, torch.linspace(0.99, 0, 5), seed=SEED, disable_pbar=True)


def test_branch_schedule_is_the_trainers(pack: Any) -> None:
    found = pack.sampling.BranchScheduleNode.execute(6, "1, 2, 3", "1, 3, 5", 0.5, 6.0, 3).result[0]
    schedule = tree.BranchSchedule(6, (1, 2, 3), (1, 3, 5), 6.0, 1000, 3)
    assert found == ", ".join(map(str, schedule.steps(500)))
    with pytest.raises(ValueError, match="steps is 6, but these sigmas have 3"):
        pack.sampling.BranchScheduleNode.execute(6, "1, 2", "1, 3", 0.5, 6.0, 3, torch.linspace(1, 0, 4))


def test_a_missing_package_is_named_with_the_fix(pack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from tmpo_pack.nodes import scoring  # type: ignore[import-not-found]

    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(ValueError, match=r"reward ocr needs rapidocr.*: pip install rapidocr"):
        scoring.ScoreImages.execute(torch.zeros(1, 64, 64, 3), 'a sign with "TAXI"', "ocr", "(hub)")


def test_the_node_offers_every_reward_but_remote(pack: Any) -> None:
    from tmpo_pack.nodes import scoring  # type: ignore[import-not-found]

    assert [*scoring.REWARDS, "remote"] == sorted(discovery.names("rewards"), key=lambda name: (name == "remote", name))
    sharp = scoring.ScoreImages.execute(torch.rand(2, 8, 8, 3), "a", "sharpness", "(hub)").result[0]
    assert list(sharp.values) == ["sharpness"] and (sharp.first() > 0).all()


def test_scores_are_combined_and_weighed_as_in_training(pack: Any) -> None:
    """Prompt by prompt, with the numbers of the trainer's own functions."""
    from tmpo_pack.nodes import scoring  # type: ignore[import-not-found]

    images, prompts, values = (
        torch.rand(6, 8, 8, 3),
        ["a", "b"] * 3,
        torch.tensor([[3.0, 1, 2, 8, 7, 5], [1, 1, 0, 2, 5, 0]]),
    )
    first, second = (scoring.Scores({name: row}, prompts, images) for name, row in zip("xy", values, strict=True))
    for zscore in (True, False):
        found = scoring.CombineScores.execute(first, "1, 0.5", zscore, second).result[0].first()
        for start in (0, 1):
            x, y = values[:, start::2]
            expected = rewards.combine({"x": x, "y": y}, [1, 0.5], "zscore" if zscore else "none")
            torch.testing.assert_close(found[start::2], expected, atol=0, rtol=0)
    averaged = scoring.CombineScores.execute(first, "", True, second).result[0].first()
    expected = rewards.combine({"x": values[0, ::2], "y": values[1, ::2]}, None, "zscore")
    torch.testing.assert_close(averaged[::2], expected, atol=0, rtol=0)
    weighed = scoring.BoltzmannWeights.execute(first, 1.5).result
    logs = [(1.5 * objectives.zscore(values[0, start::2].double())).log_softmax(0) for start in (0, 1)]
    assert weighed[1] == pytest.approx(sum(math.exp(-(log.exp() * log).sum()) for log in logs) / 2)
    torch.testing.assert_close(weighed[0].first()[::2], logs[0].exp().float())


def test_an_interpreter_without_the_trainer_is_an_error(pack: Any, tmp_path: Path) -> None:
    import subprocess

    from tmpo_pack.nodes import training  # type: ignore[import-not-found]

    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    inputs = {each.id: each.default for each in training.Train.define_schema().inputs if each.id != "output_dir"}
    python = str(tmp_path / "bare" / "bin" / "python")
    # Some libraries warn while the interpreter ends.
    (packages,) = (tmp_path / "bare" / "lib").glob("python*/site-packages")
    (packages / "sitecustomize.py").write_text("import atexit, sys\natexit.register(sys.stderr.write, 'a warning')\n")
    assert "No module named 'accelerate'" in training.missing_packages(python)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPO_PYTHON", python)
        with pytest.raises(ValueError, match=r"No module named 'accelerate'. To install it: in .* pip install"):
            training.Train.execute("run", **inputs)
        patch.setenv("TMPO_PYTHON", str(tmp_path / "nowhere"))
        with pytest.raises(ValueError, match="cannot be run"):
            training.Train.execute("run", **inputs)


def test_previews_are_those_of_latent2rgb(pack: Any) -> None:
    """x0 of the branch points: in colour as ComfyUI's own previewer has them, and as the VAE takes them."""
    import latent_preview  # type: ignore[import-not-found]
    from tmpo_pack.nodes import live  # type: ignore[import-not-found]

    _, found = sample(pack)
    assert sorted(found.previews) == sorted(found.colours) == [4, 5]
    assert len(found.previews[4]) == len(found.colours[4]) == 3 and len(found.previews[5]) == len(found.colours[5]) == 9
    kind = pack.comfy.latent_formats.SD3()
    previewer = latent_preview.Latent2RGBPreviewer(kind.latent_rgb_factors, kind.latent_rgb_factors_bias)
    x0 = kind.process_in(found.previews[5][2:3])
    stock = torch.tensor(list(previewer.decode_latent_to_preview(x0).getdata())).view(8, 8, 3)
    assert (stock - (live.in_colour(x0, kind)[0] * 255).to(torch.uint8).int()).abs().max() <= 1
    # They resemble the leaf pictures of the same branch, but blurred.
    last = pack.vae.decode(found.previews[5])
    assert last.shape == (9, 64, 64, 3) and last.std() > 0.05


def test_the_view_decodes_a_tree_once(pack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Choosing a leaf runs the view again; another VAE or tree is decoded anew, and no tree is kept alive."""
    from tmpo_pack.nodes import tree_view  # type: ignore[import-not-found]

    class Counting:
        calls = 0

        def decode(self, x0: Tensor) -> Tensor:
            self.calls += 1
            return pack.vae.decode(x0)

    monkeypatch.setattr(tree_view, "save", lambda pictures: [{} for _ in pictures])
    leaves, found = sample(pack)
    images, vae, other = pack.vae.decode(leaves), Counting(), Counting()
    shown = [tree_view.TreeView.execute(found, images, "dark", 1.0, chosen, None, vae).result for chosen in ("0", "5")]
    # Steps 4 and 5, and the first leaves.
    assert vae.calls == 3 and shown[1][1] == 5
    tree_view.TreeView.execute(found, images, "dark", 1.0, "0", None, other)
    assert other.calls == 3
    tree_view.TreeView.execute(sample(pack)[1], images, "dark", 1.0, "0", None, vae)
    assert vae.calls == 6
    # The view keeps no tree alive.
    kept = weakref.ref(found)
    del found
    gc.collect()
    assert kept() is None


def test_the_diversity_node_lists_every_measure(pack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sockets stay as they are; the text has all of `diversity.MEASURES`, also one that has just been added."""
    from tmpo_pack.nodes import diversity  # type: ignore[import-not-found]
    from tmpo_pack.tmpo_trainer.diversity import MEASURES, Measure, cosine_distances  # type: ignore[import-not-found]

    monkeypatch.setattr(diversity, "feature_vectors", lambda name, images: images.flatten(1))
    monkeypatch.setitem(MEASURES, "largest", Measure(lambda latents: latents.max(), "latents"))
    generator = torch.Generator().manual_seed(0)
    pictures, latents = torch.rand(3, 4, 4, 3, generator=generator), torch.randn(3, 16, 2, 2, generator=generator)
    *values, _, text = diversity.DiversityNode.execute("efficientnet-lite0", pictures, {"samples": latents}).result
    expected = [MEASURES[name].function(x).item() for name, x in (
        ("LGMD", latents), ("cosine diversity", pictures.flatten(1)), ("Vendi score", pictures.flatten(1)),
    )]  # fmt: skip
    assert values == expected
    assert text.splitlines() == [
        f"LGMD {values[0]:.3f}, largest {latents.max():.3f} (on the VAE's scale: connect the model)",
        f"cosine diversity {values[1]:.3f}, Vendi score {values[2]:.3f} (3 images)",
    ]
    off_diagonal = cosine_distances(pictures.flatten(1)).sum().item() / 6
    assert off_diagonal == pytest.approx(values[1], abs=1e-6)
    *values, _, text = diversity.DiversityNode.execute("efficientnet-lite0", pictures).result
    assert math.isnan(values[0]) and values[1:] == expected[1:] and len(text.splitlines()) == 1


def test_the_compare_node_shows_the_drift_of_pictures_and_latents(pack: Any) -> None:
    """Ten pairs each of a dark and a bright prompt, 26 of 255 levels apart; the scores tell the prompts."""
    from tmpo_pack.nodes import images, types  # type: ignore[import-not-found]

    rng = torch.Generator().manual_seed(0)
    level = torch.tensor([0.2, 0.6] * 10) + 0.1 * torch.rand(20, generator=rng)
    base, lora = ((level + change)[:, None, None, None].expand(20, 8, 8, 3) for change in (0, 26 / 255))
    latents = [{"samples": scale * torch.randn(20, 16, 2, 2, generator=rng.manual_seed(1))} for scale in (1, 0.5)]
    scores = types.Scores({"any": level}, ["dark", "bright"] * 10, images.thumbs(base))

    def rows(*more: Any) -> dict[str, list[str]]:
        _, text = pack.lora.Compare.execute(base, lora, 2, False, *more).result
        found = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
        return {row[0]: row[1:] for row in found} | {"last": [text.splitlines()[-1]]}

    with_prompts = rows(scores, None, *latents)
    assert with_prompts["brightness"][2] == "+0.102" and with_prompts["brightness"][4].startswith("1.00 [")
    assert with_prompts["latent norm"][4:] == ["0.50 [0.50, 0.50]"] * 2 and "contrast" in with_prompts
    within = float(with_prompts["brightness"][3].split()[0])
    # Two prompts are too few to warn of a spread, and twenty pictures of one prompt are not.
    assert within > 3 and "brightness moved by" in with_prompts["last"][0]
    assert (
        "latent_distance" not in with_prompts["last"][0] and "latent_distance" in rows(None, None, *latents)["last"][0]
    )
    without = rows()
    # As one prompt the pictures differ more among themselves.
    assert float(without["brightness"][3].split()[0]) < within / 3 and "latent norm" not in without
    with pytest.raises(ValueError, match="base_latent and lora_latent go together"):
        rows(scores, None, latents[0])
    with pytest.raises(ValueError, match="lora_latent has 3 entries for 20 images"):
        rows(scores, None, latents[0], {"samples": torch.zeros(3, 16, 2, 2)})


def test_a_sample_is_drawn_by_the_weights_of_each_prompt(pack: Any) -> None:
    """One prompt is hard: its pictures all score less. z-scored over both, q would be e^4 times as much for the other's."""
    from tmpo_pack.nodes import diversity, images, types  # type: ignore[import-not-found]

    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(20, 16, 16, 3, generator=generator)
    values = torch.tensor([1.0, 0.0] * 10) + 0.01 * torch.rand(20, generator=generator)
    scores = types.Scores({"any": values}, ["easy", "hard"] * 10, images.thumbs(pictures))
    drawn = [
        diversity.SelectBranches.execute(pictures, "sample by weight", 6, 0, 2.0, seed, 0, None, scores).result[2]
        for seed in range(50)
    ]
    hard = sum(found.prompts.count("hard") for found in drawn)
    assert 100 < hard < 200
    # Within a prompt the better ones come more often.
    taken = torch.cat([found.first() for found in drawn])
    assert taken[taken < 0.5].mean() > values[1::2].mean()


def test_leaves_with_noise_left_are_not_compared(pack: Any) -> None:
    """Another sampler continues from them and makes the pictures."""
    guider = pack.comfy.samplers.CFGGuider(pack.model)
    guider.set_conds(batch(pack, PROMPTS[:1]), batch(pack, PROMPTS[:1]))
    sigmas = pack.comfy.samplers.calculate_sigmas(pack.model.get_model_object("model_sampling"), "normal", STEPS)
    execute = pack.sampling.TreeSamplerAdvanced.execute
    noise = pack.sampling.Seeded(SEED)
    assert len(execute(noise, guider, sigmas[:7], empty(), "1, 4", 3, "cps", 0.7, 0).result[1].first) == 0
    leaves, found = execute(noise, guider, sigmas, empty(), "1, 4", 3, "cps", 0.7, 0).result
    torch.testing.assert_close(found.first, leaves["samples"][:3])


def test_a_trained_lora_changes_the_pictures_as_in_diffusers(pack: Any) -> None:
    """The LoRA that comes with the pack, 450 updates of training: through ComfyUI's patches and through diffusers."""
    base, _ = sample(pack)
    leaves, _ = sample(pack, model=pack.lora.apply_lora(pack.model, pack.lora.lora_file.read(pack.lora.DEMO_FILE), 1.0))
    backbone = loading.load_model(TrainConfig(max_sequence_length=0), torch.device("cpu"))
    with torch.inference_mode(False):
        attach.attach(backbone, REPOSITORY / "tmpo_trainer" / "demo" / "lora")
    start = pack.comfy.sample.prepare_noise(empty()["samples"], SEED)
    source = tree.keyed_noise((SEED, 0), (16, 8, 8))

    def noise(step: int, path: tree.NodePath) -> Tensor:
        return start[0] if step == 0 and path[0] == 0 else source(step, path)

    plan = tree.TreePlan.tmpo(STEPS, BRANCHES, 3)
    run = tree.rollout(backbone.velocity(PROMPTS[:1], 1.0), noise, backbone.sigmas(STEPS, 64, 64), plan, eta=0.7)
    torch.testing.assert_close((leaves - SHIFT) * SCALE, run.leaves, atol=1e-3, rtol=0)
    assert (leaves - base).abs().max() > 0.1


def test_no_noise_leaves_no_seeds_to_branch(pack: Any) -> None:
    """As in the second half of split sigmas: the latent has its noise already."""
    given = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    guider = pack.comfy.samplers.CFGGuider(pack.model)
    guider.set_conds(batch(pack, PROMPTS[:1]), batch(pack, PROMPTS[:1]))
    sigmas = pack.comfy.samplers.calculate_sigmas(pack.model.get_model_object("model_sampling"), "normal", STEPS)[3:]
    none = SimpleNamespace(seed=SEED, generate_noise=lambda latent: torch.zeros_like(latent["samples"]))
    execute = pack.sampling.TreeSamplerAdvanced.execute
    with pytest.raises(ValueError, match="no seeds to branch: leave out branch step 1"):
        execute(none, guider, sigmas, {"samples": given}, "1, 3", 3, "cps", 0.7, 0)
    assert len(execute(none, guider, sigmas, {"samples": given}, "2, 3", 3, "cps", 0.7, 0).result[0]["samples"]) == 9


def test_a_sampler_object_reports_whole_steps(pack: Any) -> None:
    """For previews and SamplerCustomAdvanced's second output: all pictures of a step, whatever the chunks."""
    sampler = pack.sampling.TreeSamplerObject.execute("1, 4, 5", 3, "cps", 0.7, 4).result[0]
    guider = pack.comfy.samplers.CFGGuider(pack.model)
    guider.set_conds(batch(pack, PROMPTS[:1]), batch(pack, PROMPTS[:1]))
    sigmas = pack.comfy.samplers.calculate_sigmas(pack.model.get_model_object("model_sampling"), "normal", STEPS)
    latent = empty()["samples"]
    noise = pack.comfy.sample.prepare_noise(latent, SEED)
    seen: list[tuple[int, int, int]] = []
    guider.sample(noise, latent, sampler, sigmas, seed=SEED, disable_pbar=True,
                  callback=lambda step, x0, x, total: seen.append((step, len(x0), total)))  # fmt: skip
    assert seen == [(step, width, STEPS) for step, width in enumerate((3, 3, 3, 3, 9, 27, 27, 27, 27, 27))]


def test_sigmas_that_stand_still_are_refused(pack: Any) -> None:
    guider = pack.comfy.samplers.CFGGuider(pack.model)
    guider.set_conds(batch(pack, PROMPTS[:1]), batch(pack, PROMPTS[:1]))
    sigmas = torch.tensor([1.0, 0.8, 0.8, 0.4, 0.0])
    with pytest.raises(ValueError, match="do not fall at every step"):
        pack.sampling.TreeSamplerAdvanced.execute(
            pack.sampling.Seeded(0), guider, sigmas, empty(), "1, 2", 3, "cps", 0.7, 0
        )


def test_lines_are_prompts_only_for_a_tree_of_as_many(pack: Any) -> None:
    from tmpo_pack.nodes import scoring  # type: ignore[import-not-found]

    _, two = sample(pack, PROMPTS)
    text = "\n".join(PROMPTS)
    assert scoring.prompts_of(text, 54, two) == list(PROMPTS) * 27
    # A prompt that is written on several lines is one, also for as many pictures.
    assert scoring.prompts_of(text, 2) == [" ".join(PROMPTS)] * 2
    assert scoring.prompts_of("a\nb\n\nc", 27) == ["a b c"] * 27
    assert scoring.prompts_of("a\nb\nc", 54, two) == ["a b c"] * 54
    with pytest.raises(ValueError, match="images has 3 entries, but the tree has 54 leaves"):
        scoring.prompts_of("a", 3, two)
    with pytest.raises(ValueError, match="empty"):
        scoring.prompts_of(" \n", 3)
