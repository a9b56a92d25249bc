"""The models: exact architectures, replaced UNets, LoRA weights, sizes, what ships and what not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import edit_json, lay_out
from safetensors.torch import save_file

from backends.base import Shapes
from backends.registry import parse_backend
from core.cli import run
from core.errors import EXIT_USAGE, PreconditionError
from core.files import ROOT, read_json, write_json
from export.__main__ import main
from export.build import ExportPlan, check_sizes
from export.bundle import Bundle, bundle_path, find_bundle
from export.graphs import exported_graph, save_graph
from export.models import LCM_SDXL, MODELS, TINY_LCM, TINY_SD, TINY_SDXL, Model
from export.parts import example_inputs, output_names, wrap
from export.request import find_lora, find_place, infer_model, make_request, require_size
from export.source.checkpoint import (
    ARCHITECTURES,
    Checkpoint,
    CheckpointError,
    open_checkpoint,
    reopen,
)

PARAMETERS = {
    # As published with the models, and as any program that loads them counts.
    "sd15": {"text_encoder": 123_060_480, "unet": 859_520_964},
    "sd-turbo": {"text_encoder": 340_387_840, "unet": 865_910_724},
    "sdxl-base": {"text_encoder": 123_060_480, "text_encoder_2": 694_659_840,
                  "unet": 2_567_463_684},
    "lcm-sdxl": {"unet": 2_567_463_684 + 256 * 320},  # and the guidance scale's projection
    "sdxl-lightning-1step": {"unet": 2_567_463_684},
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_random_weights_are_of_the_exact_architecture(name: str) -> None:
    checkpoint = open_checkpoint(MODELS[name], "random")
    for part, count in PARAMETERS[name].items():
        assert sum(p.numel() for p in checkpoint.skeleton(part).parameters()) == count, part
    assert checkpoint.model.licence


def test_every_entry_says_what_it_is_run_with() -> None:
    for model in MODELS.values():
        config = open_checkpoint(model, "random").scheduler_config()
        assert config["_class_name"] == model.scheduler
        assert (model.guidance > 1) == (model.guidance_form != "none")
        assert not model.step_counts or model.step_counts == (model.steps,)
    lightning = open_checkpoint(MODELS["sdxl-lightning-1step"], "random").scheduler_config()
    assert (lightning["prediction_type"], lightning["timestep_spacing"]) == ("sample", "trailing")
    assert "timestep_spacing" not in open_checkpoint(MODELS["sd15"], "random").scheduler_config()


# ---- graphs of the other forms


def test_the_graph_of_a_unet_with_guidance_as_an_input(tmp_path: Path) -> None:
    import onnxruntime

    config = read_json(ARCHITECTURES / "tiny-lcm" / "unet" / "config.json")
    config |= {"down_block_types": ["CrossAttnDownBlock2D"], "block_out_channels": [8],
               "up_block_types": ["CrossAttnUpBlock2D"]}  # fmt: skip
    write_json(tmp_path / "unet" / "config.json", config)
    model = replace(TINY_LCM, architecture=str(tmp_path), like=("tiny-lcm", "tiny-sdxl"))
    checkpoint = open_checkpoint(model, "random")
    module = checkpoint.module("unet", torch.float32)
    inputs = example_inputs("unet", module, 2, 64, 32, torch.float32)
    assert list(inputs) == ["sample", "timestep", "encoder_hidden_states", "timestep_cond"]
    wrapped = wrap("unet", module, TINY_LCM)
    with exported_graph(wrapped, inputs, output_names("unet", TINY_LCM), "unet") as graph:
        save_graph(graph, tmp_path)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    one = {name: tensor[:1] for name, tensor in inputs.items()}
    (found,) = session.run(None, {name: tensor.numpy() for name, tensor in one.items()})
    with torch.inference_mode():
        expected = wrapped(*one.values())
        other = wrapped(*(one | {"timestep_cond": -one["timestep_cond"]}).values())
    assert torch.allclose(torch.from_numpy(found), expected, atol=1e-4)
    assert not torch.allclose(other, expected, atol=1e-3), "the guidance scale counts"


# ---- a UNet that replaces the checkpoint's


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-sdxl of seed 5 as a folder in diffusers format."""
    from export.source.layout import COMPONENTS

    checkpoint = open_checkpoint(TINY_SDXL, "random", seed=5)
    folder = tmp_path_factory.mktemp("base") / "base"
    for part in checkpoint.model.parts:
        module: Any = checkpoint.module(part, torch.float32)
        module.save_pretrained(folder / COMPONENTS[part].folder)
    checkpoint.save_tokenizers(folder)
    shutil.copytree(checkpoint.find("scheduler"), folder / "scheduler")
    shutil.copy(checkpoint.find("model_index.json"), folder)
    return folder


@pytest.fixture
def unet_file(tmp_path: Path) -> Path:
    """UNet weights of seed 6, in one file, as SDXL-Lightning's are."""
    module = open_checkpoint(TINY_SDXL, "random", seed=6).module("unet", torch.float16)
    save_file(module.state_dict(), tmp_path / "tiny_4step_unet.safetensors")
    return tmp_path / "tiny_4step_unet.safetensors"


def weights(checkpoint: Checkpoint, part: str = "unet") -> torch.Tensor:
    return torch.cat([p.flatten() for p in checkpoint.module(part, torch.float32).parameters()])


def test_one_file_replaces_the_unet(base: Path, unet_file: Path) -> None:
    checkpoint = open_checkpoint(TINY_SDXL, str(base), unet=str(unet_file))
    expected = open_checkpoint(TINY_SDXL, "random", seed=6)
    assert torch.equal(weights(checkpoint), weights(expected))
    assert torch.equal(weights(checkpoint, "text_encoder"), weights(open_checkpoint(
        TINY_SDXL, "random", seed=5), "text_encoder"))  # fmt: skip
    again = reopen(TINY_SDXL, json.loads(json.dumps(checkpoint.source)), "fp16")
    assert again.origins == checkpoint.origins


def test_a_unet_file_of_another_model_is_refused(base: Path, unet_file: Path) -> None:
    other = open_checkpoint(TINY_SD, "random").module("unet", torch.float16)
    save_file(other.state_dict(), unet_file)
    checkpoint = open_checkpoint(TINY_SDXL, str(base), unet=str(unet_file))
    with pytest.raises(CheckpointError, match="does not hold the weights"):
        checkpoint.module("unet", torch.float16)


def test_the_models_rule_fetches_base_and_unet(
    base: Path, unet_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As sdxl-lightning: the base's UNet weights are not even looked for."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = Path(shutil.copytree(base, tmp_path / "copy"))
    for file in (folder / "unet").glob("*.safetensors"):
        file.unlink()
    lay_out(cache, "org/base", folder, "1" * 40)
    (tmp_path / "only").mkdir()
    shutil.copy(unet_file, tmp_path / "only" / "x_4step_unet.safetensors")
    (tmp_path / "only" / "x_2step_unet.safetensors").write_bytes(b"not looked at")
    lay_out(cache, "org/fast", tmp_path / "only", "2" * 40)
    model = replace(
        TINY_SDXL, checkpoint="org/base", unet="org/fast/x_4step_unet.safetensors",
        step_counts=(4,), steps=4,
    )  # fmt: skip
    checkpoint = open_checkpoint(model, "hub")
    assert torch.equal(weights(checkpoint), weights(open_checkpoint(TINY_SDXL, "random", seed=6)))
    assert checkpoint.source["unet"]["revision"] == "2" * 40
    assert reopen(model, checkpoint.source, "fp16").origins == checkpoint.origins
    gone = replace(model, unet="org/fast/x_8step_unet.safetensors")
    with pytest.raises(CheckpointError, match="x_8step_unet.safetensors cannot be had"):
        open_checkpoint(gone, "hub")
    with pytest.raises(CheckpointError, match="which of its files is meant"):
        open_checkpoint(TINY_SDXL, str(base), loras=["org/fast"])


@pytest.mark.parametrize(
    ("name", "cls", "spacing", "prediction"),
    [
        ("sdxl-turbo", "EulerAncestralDiscreteScheduler", "trailing", "epsilon"),
        ("sd-turbo", "EulerDiscreteScheduler", "trailing", "epsilon"),
        ("sd15", "PNDMScheduler", "leading", "epsilon"),
        ("sdxl-base", "EulerDiscreteScheduler", "leading", "epsilon"),
        ("sdxl-lightning", "EulerDiscreteScheduler", "trailing", "epsilon"),
        ("sdxl-lightning-1step", "EulerDiscreteScheduler", "trailing", "sample"),
        ("lcm-sdxl", "LCMScheduler", "leading", "epsilon"),
    ],
)
def test_schedulers_are_as_published(name: str, cls: str, spacing: str, prediction: str) -> None:
    """By the checkpoints' own configs and cards; what a config leaves out is diffusers' default."""
    import diffusers

    config = open_checkpoint(MODELS[name], "random").scheduler_config()
    made = getattr(diffusers, cls).from_config(config).config
    assert config["_class_name"] == cls
    found = (made.timestep_spacing, made.prediction_type, made.steps_offset)
    assert found == (spacing, prediction, 1)
    assert (made.beta_schedule, made.beta_start, made.beta_end) == ("scaled_linear", 0.00085, 0.012)


def test_a_folder_s_own_unet_is_not_taken_for_the_model_s(base: Path, unet_file: Path) -> None:
    """SDXL's UNet has the shapes of Lightning's."""
    model = replace(TINY_SDXL, checkpoint="org/base", unet="org/fast/x_4step_unet.safetensors")
    with pytest.raises(CheckpointError, match="a UNet over the rest of org/base") as caught:
        open_checkpoint(model, str(base))
    assert "--unet org/fast/x_4step_unet.safetensors" in caught.value.next
    assert open_checkpoint(model, str(base), unet=str(unet_file)).source["unet"]["kind"] == "file"
    assert "unet" not in open_checkpoint(model, "random").source


def test_a_model_with_guidance_as_an_input_wants_such_a_unet(base: Path) -> None:
    model = replace(LCM_SDXL, size=64, sizes=(32, 256), unet=None)
    checkpoint = open_checkpoint(model, str(base), taesd=str(base / "taesd"))
    configs = {part: checkpoint.skeleton(part).config for part in model.parts}
    with pytest.raises(PreconditionError) as caught:
        check_sizes(ExportPlan(checkpoint, "fp16", 64, 64, {}), configs)
    assert "guidance scale as an input" in caught.value.why
    assert "--unet" in caught.value.next


def test_a_checkpoint_that_ships_with_the_checkout(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`folder=`: found from anywhere, by a path that holds wherever the checkout lies."""
    monkeypatch.setattr("export.request.ROOT", base.parent)
    monkeypatch.chdir(tmp_path)
    edit = Path(shutil.copytree(base, tmp_path / "shipped"))
    edit_json(edit / "scheduler" / "scheduler_config.json", _class_name="DDIMScheduler",
              prediction_type="v_prediction", rescale_betas_zero_snr=True)  # fmt: skip
    edit_json(edit / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    monkeypatch.setattr("export.request.ROOT", tmp_path)
    model = replace(TINY_SDXL, folder="shipped", scheduler="", spacing="")
    request = make_request(model, "folder")
    assert (request.weights.kind, request.weights.path) == ("folder", "shipped")
    assert request.as_dict()["fingerprint"]
    checkpoint = open_checkpoint(model, "folder")
    config = checkpoint.scheduler_config()
    assert config["_class_name"] == "DDIMScheduler"
    assert (config["prediction_type"], config["rescale_betas_zero_snr"]) == ("v_prediction", True)
    assert reopen(model, checkpoint.source, "fp16").origins == checkpoint.origins
    with pytest.raises(CheckpointError, match="no such folder"):
        make_request(TINY_SDXL, "folder")


def test_a_folder_of_the_sd_form_is_read(base: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "my-sd"))
    shutil.rmtree(folder / "text_encoder_2")
    edit_json(folder / "unet" / "config.json", addition_embed_type=None)
    model = infer_model(folder)
    assert (model.text_encoders, model.pooled, model.guidance_form) == (("final",), False, "free")
    edit_json(folder / "unet" / "config.json", time_cond_proj_dim=16)
    assert (infer_model(folder).guidance_form, infer_model(folder).guidance) == ("embedding", 8.0)
    edit_json(folder / "unet" / "config.json", addition_embed_type="text_time")
    with pytest.raises(CheckpointError, match="SD form"):
        infer_model(folder)


def test_the_model_index_decides_on_the_empty_prompt(base: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "other"))
    assert open_checkpoint(TINY_SDXL, str(folder)).force_zeros
    edit_json(folder / "model_index.json", force_zeros_for_empty_prompt=False)
    assert not open_checkpoint(TINY_SDXL, str(folder)).force_zeros
    assert not open_checkpoint(TINY_SD, "random").force_zeros, "only SDXL has it"


# ---- LoRA weights

LAYERS = {
    "unet": "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "unet out": "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0",
    "unet conv": "down_blocks.1.resnets.0.conv1",
    "text_encoder": "encoder.layers.0.self_attn.q_proj",
}
RANK, ALPHA = 2, 4.0


def peft(part: str, layer: str) -> tuple[str, str, str | None]:
    return f"{part}.{layer}.lora_A.weight", f"{part}.{layer}.lora_B.weight", None


def kohya(part: str, layer: str) -> tuple[str, str, str | None]:
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te1_text_model_"}[part]
    name = prefix + layer.replace(".", "_")
    return f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha"


def older(part: str, layer: str) -> tuple[str, str, str | None]:
    """diffusers before PEFT: attention processors, and linear layers of their own."""
    if part == "text_encoder":
        name = f"text_encoder.text_model.{layer}.lora_linear_layer"
    elif ".attn" in layer:
        head, _, last = layer.replace("to_out.0", "to_out").rpartition(".")
        name = f"unet.{head}.processor.{last}_lora"
    else:
        name = f"unet.{layer}.lora"
    return f"{name}.down.weight", f"{name}.up.weight", None


Names = Callable[[str, str], tuple[str, str, str | None]]


def write_lora(file: Path, checkpoint: Checkpoint, names: Names) -> dict[str, torch.Tensor]:
    """A file of LoRA weights for LAYERS; layer -> what it adds at weight 1."""
    generator, tensors, deltas = torch.Generator().manual_seed(0), {}, {}
    for key, layer in LAYERS.items():
        part = key.partition(" ")[0]
        shape = checkpoint.skeleton(part).get_parameter(f"{layer}.weight").shape
        down = torch.randn(RANK, *shape[1:], generator=generator)
        up = torch.randn(shape[0], RANK, *[1] * (len(shape) - 2), generator=generator)
        down_name, up_name, alpha_name = names(part, layer)
        tensors |= {down_name: down, up_name: up}
        delta = (up.flatten(1) @ down.flatten(1)).reshape(shape)
        if alpha_name:
            tensors[alpha_name] = torch.tensor(ALPHA)
            delta = delta * ALPHA / RANK
        deltas[key] = delta
    save_file(tensors, file)
    return deltas


@pytest.mark.parametrize("names", [peft, kohya, older])
def test_lora_weights_are_fused_whatever_they_are_called(tmp_path: Path, names: Names) -> None:
    plain = open_checkpoint(TINY_SDXL, "random", seed=1)
    deltas = write_lora(tmp_path / "style.safetensors", plain, names)
    asked = f"{tmp_path / 'style.safetensors'}:0.5"
    fused = open_checkpoint(TINY_SDXL, "random", seed=1, loras=[asked])
    fused.loras[0].check({p: fused.skeleton(p) for p in TINY_SDXL.parts}, fused.config("unet"))
    for part in ("unet", "text_encoder"):
        before = dict(plain.module(part, torch.float32).named_parameters())
        after = dict(fused.module(part, torch.float32).named_parameters())
        half = dict(fused.module(part, torch.float16).named_parameters())
        touched = {f"{LAYERS[key]}.weight": deltas[key] for key in LAYERS if key.startswith(part)}
        for name in before:
            expected = before[name] + 0.5 * touched[name] if name in touched else before[name]
            assert torch.allclose(after[name], expected, rtol=1e-3, atol=1e-3), name
            assert torch.equal(half[name].float(), after[name]), "the same numbers in both dtypes"
        assert all(not torch.equal(after[name], before[name]) for name in touched)
    source = json.loads(json.dumps(fused.source))
    assert [lora["name"] for lora in source["loras"]] == ["style@0.5"]
    assert torch.equal(weights(reopen(TINY_SDXL, source, "fp16")), weights(fused))


def test_lora_weights_with_peft_settings(tmp_path: Path) -> None:
    plain = open_checkpoint(TINY_SDXL, "random")
    file = tmp_path / "x.safetensors"
    deltas = write_lora(file, plain, peft)
    from safetensors.torch import load_file

    def with_settings(**settings: object) -> Checkpoint:
        header = {"lora_adapter_metadata": json.dumps(settings)}
        save_file(load_file(file), file, metadata=header)
        return open_checkpoint(TINY_SDXL, "random", loras=[str(file)])

    name = f"{LAYERS['unet']}.weight"
    before = plain.module("unet", torch.float32).get_parameter(name)
    alpha = {"unet.lora_alpha": 8, "unet.r": RANK}
    for settings, scale in (
        (alpha, 8 / RANK),
        (alpha | {"unet.use_rslora": True}, 8 / RANK**0.5),
        (alpha | {"unet.alpha_pattern": {"attn1.to_q": 4}}, 4 / RANK),
        (alpha | {"unet.alpha_pattern": {}, "text_encoder.lora_alpha": 1}, 8 / RANK),
    ):
        after = with_settings(**settings).module("unet", torch.float32).get_parameter(name)
        assert torch.allclose(after - before, deltas["unet"] * scale, atol=0.1), settings
    for odd in ("use_dora", "lora_bias", "modules_to_save", "fan_in_fan_out"):
        with pytest.raises(CheckpointError, match=odd):
            with_settings(**{f"unet.{odd}": True}).module("unet", torch.float32)


def test_lora_weights_in_peft_s_own_layout(tmp_path: Path) -> None:
    """Settings lie in adapter_config.json beside the weights; the keys begin as PEFT has them."""
    from safetensors.torch import load_file

    plain = open_checkpoint(TINY_SDXL, "random")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    file.parent.mkdir()
    deltas = write_lora(file, plain, peft)
    renamed = {
        f"base_model.model.{key.removeprefix('unet.')}": tensor
        for key, tensor in load_file(file).items()
        if key.startswith("unet.")
    }
    save_file(renamed, file)
    folder, name = str(file.parent), f"{LAYERS['unet']}.weight"
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is missing"):
        open_checkpoint(TINY_SDXL, "random", loras=[folder]).module("unet", torch.float32)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "bias": "none",
              "target_modules": ["to_q"], "init_lora_weights": True}  # fmt: skip
    write_json(file.parent / "adapter_config.json", config)
    request = make_request(TINY_SDXL, "random", loras=[str(file)])
    asked = request.as_dict()["fingerprint"]
    write_json(file.parent / "adapter_config.json", config | {"bias": "all"})
    assert request.as_dict()["fingerprint"] != asked
    write_json(file.parent / "adapter_config.json", config)
    fused = open_checkpoint(TINY_SDXL, "random", loras=[folder])
    fused.loras[0].check({p: fused.skeleton(p) for p in TINY_SDXL.parts}, fused.config("unet"))
    before = plain.module("unet", torch.float32).get_parameter(name)
    after = fused.module("unet", torch.float32).get_parameter(name)
    assert torch.allclose(after - before, deltas["unet"] * 16 / RANK, atol=0.1)
    write_json(file.parent / "adapter_config.json", config | {"init_lora_weights": "pissa"})
    with pytest.raises(CheckpointError, match="init_lora_weights 'pissa'"):
        fused.module("unet", torch.float32)


def test_lora_weights_of_the_hub_keep_the_name_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most repositories call their file the same."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "style"
    folder.mkdir()
    file = folder / "pytorch_lora_weights.safetensors"
    write_lora(file, open_checkpoint(TINY_SDXL, "random"), peft)
    lay_out(tmp_path / "hub", "org/style", folder, "1" * 40)
    fused = open_checkpoint(TINY_SDXL, "random", loras=["org/style:0.5"])
    (lora,) = fused.source["loras"]
    assert (lora["name"], lora["place"]["revision"]) == ("style@0.5", "1" * 40)
    assert torch.equal(weights(reopen(TINY_SDXL, fused.source, "fp16")), weights(fused))


def broken(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], file: Path) -> str:
    from safetensors.torch import load_file

    save_file(change(load_file(file)), file)
    return str(file)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {"unet.up_blocks.9.conv.lora_A.weight": torch.ones(2, 8),
                    "unet.up_blocks.9.conv.lora_B.weight": torch.ones(8, 2)}, "unet has no layer"),
        (lambda t: {name: torch.ones(2, 3) for name in t}, "another shape"),
        (lambda t: {f"text_encoder_3.{name}": t[name] for name in t}, "of no LoRA layer"),
        (lambda t: dict(list(t.items())[:1]), "one half is missing"),
        (lambda t: t | {"unet.conv_in.lora_magnitude_vector": torch.ones(8)}, "not plain LoRA"),
        (lambda t: t | {"lora_unet_conv_in.hada_w1_a": torch.ones(8)}, "not plain LoRA"),
    ],
)  # fmt: skip
def test_lora_weights_that_do_not_fit_are_refused_before_work(
    change: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.safetensors"
    write_lora(file, open_checkpoint(TINY_SDXL, "random"), peft)
    argv = ["--model", "tiny-sdxl", "--lora", broken(change, file), "--out", str(tmp_path / "b")]
    assert run(main, argv) == EXIT_USAGE
    told = capsys.readouterr().err
    assert words in told
    assert "next:" in told
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("text", "name", "weight"),
    [("org/lcm-lora", "lcm-lora", 1.0), ("org/a/b_4step.safetensors:0.8", "b_4step@0.8", 0.8)],
)
def test_lora_words(text: str, name: str, weight: float) -> None:
    found = find_lora(text)
    assert (found.name, found.weight) == (name, weight)


@pytest.mark.parametrize("text", ["nowhere", "x.safetensors", "org/a:0", "org/a:nan", "a:b"])
def test_lora_words_that_mean_nothing(text: str) -> None:
    with pytest.raises(CheckpointError):
        find_lora(text)


def test_a_vae_may_be_a_single_file() -> None:
    place = find_place("org/name/vae.safetensors", "--vae", files=True)
    assert (place.kind, place.id, place.file) == ("hub", "org/name", "vae.safetensors")


# ---- sizes and names


@pytest.mark.parametrize(
    ("model", "size", "words"),
    [
        ("sd15", (516, 512), "multiples of 8"),
        ("sdxl-base", (2056, 512), "256 to 2048"),
        ("sdxl-base", (1216, 896), "about 1024x1024 pixels"),
        ("sd15", (128, 128), "256 to 2048"),
    ],
)
def test_sizes_that_a_model_does_not_draw(model: str, size: tuple[int, int], words: str) -> None:
    checkpoint = open_checkpoint(MODELS[model], "random")
    with pytest.raises(PreconditionError, match=words) as caught:
        require_size(checkpoint.model, checkpoint.multiple, *size)
    assert "--size" in caught.value.next


BUCKETS = ((1216, 832), (1152, 896), (1344, 768), (1536, 640), (2048, 512), (512, 1984))
"""Some of the aspects that SDXL was trained on."""


@pytest.mark.parametrize("name", [m.name for m in MODELS.values() if m.checkpoint is not None])
def test_sizes_that_every_large_model_draws(name: str) -> None:
    checkpoint = open_checkpoint(MODELS[name], "random")
    for size in ((256, 256), (512, 512), (1024, 1024), (768, 512), (520, 512), *BUCKETS):
        require_size(checkpoint.model, checkpoint.multiple, *size)


def test_a_bundle_is_found_by_its_size(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path))
    own = shutil.copytree(tiny_bundle.path, bundle_path("tiny-sdxl", "random", "fp16"))
    wide = shutil.copytree(tiny_bundle.path, bundle_path("tiny-sdxl", "random", "fp16", (96, 64)))
    assert wide.name == "tiny-sdxl-random-fp16-96x64"
    edit_json(wide / "manifest.json", size=[96, 64])
    assert find_bundle("tiny-sdxl").path == own
    assert find_bundle("tiny-sdxl", size=(64, 64)).path == own
    assert find_bundle("tiny-sdxl", size=(96, 64)).path == wide
    with pytest.raises(PreconditionError, match="96x96") as caught:
        find_bundle("tiny-sdxl", size=(96, 96))
    assert "--size 96x96" in caught.value.next
    with pytest.raises(PreconditionError, match="made for 64x64"):
        find_bundle(str(own), size=(96, 64))
    with pytest.raises(PreconditionError) as caught:
        find_bundle("tiny-sdxl+style", weights="random")
    assert "--model tiny-sdxl --weights random" in caught.value.next
    assert "--lora" in caught.value.next


def test_an_older_manifest_still_opens(tiny_bundle: Bundle) -> None:
    """Made before guidance, LoRA weights and UNets of their own were known."""
    new = {"guidance_form", "schedulers", "step_counts", "prediction", "unet", "folder", "like",
           "sizes", "judge", "force_zeros", "pixels", "least_steps"}  # fmt: skip
    pipeline = {k: v for k, v in tiny_bundle.manifest["pipeline"].items() if k not in new}
    old = Bundle(tiny_bundle.path, tiny_bundle.manifest | {"pipeline": pipeline})
    assert old.model.guidance_form == "none"
    assert old.force_zeros
    assert old.loras == ()
    from export.request import differences

    request = {k: v for k, v in tiny_bundle.manifest["request"].items()
               if k not in ("unet", "loras", "embeddings", "variant")}  # fmt: skip
    request["weights"] = {k: v for k, v in request["weights"].items() if k != "file"}
    asked = make_request(TINY_SDXL, "random").as_dict()
    assert differences(request, asked) == []


# ---- whole exports, minutes long


@pytest.mark.slow
def test_a_guided_model_at_a_size_of_its_own_with_lora(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exported, compared with torch, and drawn with: everything at once."""
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path))
    module = open_checkpoint(TINY_SD, "random").skeleton("unet")
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    out_width, in_width = module.get_parameter(f"{layer}.weight").shape
    save_file(
        {f"unet.{layer}.lora_A.weight": torch.ones(2, in_width),
         f"unet.{layer}.lora_B.weight": torch.ones(out_width, 2)},
        tmp_path / "style.safetensors",
    )  # fmt: skip
    argv = ["--model", "tiny-sd", "--size", "96x64", "--lora", str(tmp_path / "style.safetensors")]
    assert run(main, argv) == 0
    bundle = find_bundle("tiny-sd+style", size=(96, 64))
    assert (bundle.name, bundle.size, bundle.loras) == ("tiny-sd+style", (96, 64), ("style",))
    assert read_json(bundle.path / "parity.json")["ok"]
    with parse_backend("ort").pipeline(bundle, "taesd", Shapes(1, 96, 64)) as pipeline:
        out = pipeline(["a star"], steps=20)
    assert (out.nfe, out.images.shape) == (42, (1, 64, 96, 3))
    assert run(main, argv) == 0, "it is there already"
    assert run(main, [*argv[:-2], "--lora", f"{argv[-1]}:0.5", "--out", str(bundle.path)]) == 2


def test_the_readme_of_the_architectures_names_every_folder() -> None:
    folder = ROOT / "export" / "architectures"
    text = (folder / "README.md").read_text()
    assert all(f"`{each.name}`" in text for each in folder.iterdir() if each.is_dir())
    assert all(isinstance(model, Model) for model in MODELS.values())
