"""Students with two times: one folder for any number of steps, which diffusers samples as our own solver does."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from safetensors.torch import load_file, save_file

from fewstep.data.batch import Cond
from fewstep.draws import Draw
from fewstep.errors import UserError
from fewstep.exporting.card import schedule_from
from fewstep.exporting.doctor import doctor
from fewstep.exporting.fresh import given_noise, images_of
from fewstep.exporting.index import foreign_code
from fewstep.exporting.pipeline import addresses, generate, load_pipeline
from fewstep.exporting.reload import reload_check
from fewstep.exporting.targets import target_for, training_path
from fewstep.maths.paths import FlowPath
from fewstep.maths.solvers import Schedule
from fewstep.models.folder import card, open_model
from fewstep.models.registry import FAMILIES
from fewstep.nets.extra_inputs import feeding, reads

from .students import EPS, FLOW, SHIFTED, VPRED
from .two_times import images, two_times

ROWS, SEED = 3, 0
SAMPLERS = ("any", "few", "multi")
CODE = ["pipeline_fewstep_class_v1.py", "times/modeling_fewstep_times_v1.py"]


def theirs(pipeline, steps, guidance=None):
    """The pipeline's images, on the noise of ours."""
    with given_noise(pipeline, addresses(Draw.for_images(SEED, range(ROWS)))):
        made = images_of(pipeline, ROWS, [0, 1, 2], steps, guidance)
    return torch.from_numpy(made).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A student of `any` and its folder."""
    s = two_times()
    return s, s.export(tmp_path_factory.mktemp("told") / "m", base="a base")


@pytest.fixture
def copy(told, tmp_path):
    """A copy of that folder, which a test may break."""
    return shutil.copytree(told[1], tmp_path / "m")


# images


@pytest.mark.parametrize("family", ["unet2d", "dit"])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_any_number_of_steps_makes_the_solvers_images(tmp_path, family, sampler, guidance):
    s = two_times(family, sampler, guidance)
    pipeline = load_pipeline(s.export(tmp_path / "m"), device="cpu")
    assert type(pipeline).__name__ == "FewStepClassPipeline"
    for steps in (1, 2, 3, 4, 8, 50):
        ours = images(s, ROWS, steps)
        assert (theirs(pipeline, steps) - ours).abs().max() < 1e-5, steps
        assert ours.std() > 0.1


@pytest.mark.parametrize("path", [EPS, VPRED], ids=["epsilon", "v"])
@pytest.mark.parametrize(("sampler", "guidance"), [("any", 2.0), ("few", 2.0), ("multi", 1.0)])
def test_variance_preserving_students_do_too(tmp_path, path, sampler, guidance):
    s = two_times("unet2d", sampler, guidance, path)
    pipeline = load_pipeline(s.export(tmp_path / "m"), device="cpu")
    for steps in (1, 2, 4, 8, 50):
        # x0 = (x - sigma e) / alpha: what is off in the last place of the first step is divided by alpha = .07
        assert (theirs(pipeline, steps) - images(s, ROWS, steps)).abs().max() < 5e-5, steps


@pytest.mark.parametrize(("path", "sampler"), [(SHIFTED, "any"), (SHIFTED, "few"), (EPS, "any"), (VPRED, "few")])
def test_guided_images_get_the_norm_of_the_conditional_ones(tmp_path, path, sampler):
    s = two_times("unet2d", sampler, 4.0, path, rescale="energy")
    pipeline = load_pipeline(s.export(tmp_path / "m"), device="cpu")
    plain = two_times("unet2d", sampler, 4.0, path)
    for steps in (1, 4, 8):
        ours = images(s, ROWS, steps)
        assert (theirs(pipeline, steps) - ours).abs().max() < 5e-5, steps
        assert (ours - images(plain, ROWS, steps)).abs().max() > 1e-2, steps


def test_the_last_step_is_told_its_share(tmp_path):
    s = two_times(last=0.5)
    pipeline = load_pipeline(s.export(tmp_path / "m"), device="cpu")
    for steps in (1, 3):
        assert (theirs(pipeline, steps) - images(s, ROWS, steps)).abs().max() < 1e-5
        assert (images(two_times(), ROWS, steps) - images(s, ROWS, steps)).abs().max() > 1e-3


def test_the_three_ways_differ_so_that_the_second_time_counts():
    ways = [images(two_times(sampler=sampler), ROWS, 1) for sampler in ("any", "multi")]
    assert (ways[0] - ways[1]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("family", "sampler", "guidance", "more"),
    [
        ("dit", "any", 2.0, {"rescale": "energy", "last": 0.25}),
        pytest.param("unet2d", "few", 1.0, {}, marks=pytest.mark.slow),
        pytest.param("unet2d", "multi", 1.0, {}, marks=pytest.mark.slow),
        pytest.param("unet2d", "any", 3.0, {"path": EPS}, marks=pytest.mark.slow),
    ],
)
def test_a_process_that_has_only_diffusers_makes_them_in_every_number_of_steps(
    tmp_path, family, sampler, guidance, more
):
    s = two_times(family, sampler, guidance, **more)
    noise = addresses(Draw.for_images(SEED, range(ROWS)))
    start, *later = [noise(i, (ROWS, *s.family.row_shape(s.module))) for i in range(50)]
    numbers = (1, 2, 8, 50) if "path" in more else (1, 2, 3, 8, 50)
    further = {steps: 2 * images(s, ROWS, steps) - 1 for steps in numbers}
    off = reload_check(s.export(tmp_path / "m"), 2 * s.images(ROWS) - 1, start, s.labels(ROWS), later, None, further)
    assert off < 5e-5


def test_sampling_by_name_takes_any_number_of_steps(told):
    s, folder = told
    for steps in (3, 8):
        made = generate(folder, ROWS, SEED, steps=steps)
        assert made.nfe == steps
        assert (made.images / 255 - images(s, ROWS, steps)).abs().max() <= 0.5 / 255 + 1e-5


# the folder


def test_the_folder_says_what_it_is(told):
    s, folder = told
    said, index = card(folder), json.loads((folder / "model_index.json").read_text())
    assert schedule_from(said["schedule"]) == s.schedule
    assert (said["times"], said["remote_code"], said["steps"]) == (["s"], CODE, [1, 2, 3, 4])
    assert index["times"] == ["modeling_fewstep_times_v1", "FewStepTimes"]
    assert (index["target"], index["last"], index["rescale"]) == ("next", 0.0, None)
    assert {f"times/{name}" for name in ("diffusion_pytorch_model.safetensors", "modeling_fewstep_times_v1.py")} <= set(
        said["sha256"]
    )
    text = (folder / "README.md").read_text()
    for words in ("trust_remote_code=True", "num_inference_steps=N", "the level that the step goes to", *CODE):
        assert words in text


def test_the_network_alone_is_the_plain_flow_model(told):
    """Stock class, stock weights; it answers as the student does at s = t, bit for bit."""
    s, folder = told
    network = UNet2DModel.from_pretrained(folder / "unet", use_safetensors=True)
    x, t, label = torch.randn(ROWS, 1, 8, 8), torch.full((ROWS,), 0.4), torch.arange(ROWS)
    with feeding(s.module, Cond(s=t), t):
        expected = s.module(x, 1000 * t, class_labels=label).sample
    assert torch.equal(network(x, 1000 * t, class_labels=label).sample, expected)


def test_code_of_the_folder_runs_with_consent_only_and_never_with_ours_installed(copy, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    marker, file = tmp_path / "ran", copy / CODE[1]
    file.write_text(f"{file.read_text()}\nopen({str(marker)!r}, 'w')\n")
    assert type(load_pipeline(copy).times).__module__ == "fewstep_pipelines.modeling_fewstep_times_v1"
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(copy)
    assert not marker.exists()
    DiffusionPipeline.from_pretrained(copy, trust_remote_code=True)
    assert marker.exists()


@pytest.mark.parametrize(
    ("part", "file"),
    [("unet", "unet/modeling_fewstep_times_v1.py"), ("../times/modeling_fewstep_times_v1", None)],
)
def test_copies_that_another_component_would_run_are_foreign(copy, part, file):
    if file:
        shutil.copyfile(copy / CODE[1], copy / file)
    else:
        index = json.loads((copy / "model_index.json").read_text())
        (copy / "model_index.json").write_text(json.dumps({**index, "unet": [part, "FewStepTimes"]}))
    assert len(foreign_code(copy)) == 1
    with pytest.raises(UserError, match="brings code"):
        load_pipeline(copy)


def test_a_folder_saved_again_is_whole_again(told, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    s, folder = told
    DiffusionPipeline.from_pretrained(folder, trust_remote_code=True).save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/model_index.json").read_text())["times"][0] == "modeling_fewstep_times_v1"
    again = DiffusionPipeline.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert (theirs(again, 3) - images(s, ROWS, 3)).abs().max() < 1e-5
    load_pipeline(tmp_path / "again").save_pretrained(tmp_path / "third")
    assert (theirs(load_pipeline(tmp_path / "third", device="cpu"), 3) - images(s, ROWS, 3)).abs().max() < 1e-5


# the doctor


def errors(folder):
    return [finding.what for finding in doctor(folder) if finding.level == "error"]


def test_a_sound_folder_has_only_good_news(told):
    found = doctor(told[1])
    assert {finding.level for finding in found} == {"ok"}
    assert any("told its second time ('next')" in finding.what for finding in found)


def test_missing_and_damaged_times_are_found(copy):
    weights = copy / "times/diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    save_file({name: tensor + 1 for name, tensor in state.items()}, weights)
    assert any("times/" in error and "sha256 differs" in error for error in errors(copy))
    shutil.rmtree(copy / "times")
    assert any("times/config.json" in error and "missing" in error for error in errors(copy))
    with pytest.raises(UserError, match="cannot load"):
        load_pipeline(copy)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"times": [None, None]}, "names no times"),
        ({"target": "same"}, "target = same; exported was next"),
        ({"rescale": "energy"}, "rescale = energy; exported was None"),
    ],
)
def test_a_pipeline_that_tells_something_else_is_found(copy, change, words):
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, **change}))
    assert any(words in error for error in errors(copy))


# which pipeline, and what none can do


def test_plain_euler_on_a_table_is_a_stock_pipeline_that_keeps_the_second_time_beside_it(tmp_path):
    """Told s = t a network is an ordinary one; what it learnt of s is there for training it further."""
    s = two_times("unet2d", "multi", path=EPS)
    folder = s.export(tmp_path / "m")
    said = card(folder)
    assert (said["pipeline"], said["remote_code"], said["times"]) == ("ConsistencyModelPipeline", [], None)
    assert not list(folder.rglob("*.py")) and reads(open_model(folder).module) == ("s",)
    assert {finding.level for finding in doctor(folder)} == {"ok"}


def test_flow_students_are_never_given_whole_labels():
    """They were trained on any t: the stock row, whose scheduler rounds them, is passed over."""
    assert not two_times(sampler="multi").path.integer_timesteps


def test_an_adapter_told_zero_takes_ordinary_rows():
    """Its label t - s / 2 is the ordinary one at s = 0: no second time is asked of any pipeline."""
    vp = FAMILIES.get("unet2d").build(sample_size=8, path=EPS).path
    target = target_for(FAMILIES.get("unet2d"), vp, Schedule("renoise", vp.grid(4), target="zero"), steps=(1, 4, 50))
    assert target.pipeline == "diffusers:ConsistencyModelPipeline"


def test_every_offered_number_must_be_one_that_the_scheduler_makes():
    family, path = FAMILIES.get("unet2d"), FAMILIES.get("unet2d").build(sample_size=8, path=EPS).path

    def on(path):
        return Schedule("ode", path.grid(4), target="next")

    assert training_path(family, path, on, reads=("s",), steps=(1, 2, 4, 8, 50)) == path
    with pytest.raises(UserError, match="no diffusers scheduler makes these"):
        training_path(family, path, on, reads=("s",), steps=(1, 3, 4))  # DDIM steps by whole thirds of a thousand
    assert training_path(family, FlowPath(), on, reads=("s",), steps=(1, 3, 7)) == FlowPath()


def test_families_whose_pipelines_tell_no_second_time_are_refused_with_the_mend():
    family = FAMILIES.get("stable_diffusion")
    path = FAMILIES.get("unet2d").build(sample_size=8, path=EPS).path

    def on(path):
        return Schedule("renoise", path.grid(4), target="zero")

    with pytest.raises(UserError, match=r"no pipeline tells a stable_diffusion student its second time: .*tune: lora"):
        training_path(family, path, on, labels=False, latent=True, reads=("s",))
    assert training_path(family, path, on, labels=False, latent=True) == path


def test_guidance_that_keeps_the_norm_is_refused_where_no_pipeline_knows_it():
    """Self-E's, of its instantaneous velocities: without guidance the stock pipeline samples them."""
    family = FAMILIES.get("stable_diffusion")
    path = FAMILIES.get("unet2d").build(sample_size=8, path=EPS).path

    def on(guidance):
        return lambda path: Schedule("ode", path.grid(4), guidance=guidance, rescale="energy", target="same")

    with pytest.raises(UserError, match=r"StableDiffusionPipeline does not keep the norm .*config.guidance_scale: 1$"):
        training_path(family, path, on(5.0), labels=False, latent=True, reads=("s",))
    assert training_path(family, path, on(1.0), labels=False, latent=True, reads=("s",)) == path


# loading back


def test_a_folder_opens_with_its_trained_second_time(told):
    s, folder = told
    loaded = open_model(folder)
    assert reads(loaded.module) == ("s",) and loaded.path == s.path
    ours, again = s.module.state_dict(), loaded.module.state_dict()
    assert set(ours) - set(again) == {f"extra_inputs.embeddings.sign.{i}.weight" for i in (0, 2)}
    assert all(torch.equal(ours[name], tensor) for name, tensor in again.items())


def test_damaged_times_are_a_one_line_error(copy):
    (copy / "times/diffusion_pytorch_model.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="cannot load the second time") as caught:
        open_model(copy)
    assert "\n" not in str(caught.value)


def test_points_keep_their_second_time_on_disk(tmp_path):
    from fewstep.exporting.folder import export

    family = FAMILIES.get("mlp")
    module = family.upgrade(family.build(classes=3).module, ("s",))
    with torch.no_grad():
        module.extra_inputs.embeddings["s"][2].weight.normal_()
    folder = export(module, family, FlowPath(), Schedule("ode", (1.0,), target="next"), tmp_path / "m", card={})
    again = open_model(folder).module
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in module.state_dict().items())


def test_the_path_of_the_folder_is_that_of_training():
    assert two_times(path=FLOW).path == FlowPath()
