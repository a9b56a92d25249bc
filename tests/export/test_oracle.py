"""Our images against diffusers' own pipelines, over settings that nobody chose by hand."""

from __future__ import annotations

import inspect
import tempfile
from pathlib import Path
from typing import Any

import diffusers
from folders import edit_json
from hypothesis import HealthCheck, event, example, given, reject, settings
from hypothesis import strategies as st
from small import copied, distance, opened, redraw

from core.files import read_json, write_json
from export.source.layout import CheckpointError

NEAR_DB = 60.0
CHOICES: dict[str, tuple[Any, ...]] = {
    "prediction_type": ("epsilon", "sample", "v_prediction"),
    "timestep_spacing": ("linspace", "leading", "trailing"),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "deis"),
    "solver_type": ("midpoint", "heun", "bh1", "bh2", "logrho"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "interpolation_type": ("linear", "log_linear"),
    "timestep_type": ("discrete", "continuous"),
    "variance_type": ("fixed_small", "fixed_large", "learned_range", None),
    "num_train_timesteps": (1000, 100),
    "steps_offset": (0, 1),
    "beta_start": (0.00085, 0.0001),
    "beta_end": (0.012, 0.02),
    "trained_betas": (None,),
    "sigma_min": (None, 0.03),
    "sigma_max": (None, 14.0),
    "dynamic_thresholding_ratio": (0.995, 0.9),
    "original_inference_steps": (50, 20),
}
"""Legal values of the schedulers' keys that are no truth values."""
SCHEDULERS = sorted(
    {cls.name for cls in diffusers.schedulers.KarrasDiffusionSchedulers}
    | {"TCDScheduler", "SASolverScheduler", "EDMEulerScheduler"}
)
VAE: dict[str, tuple[Any, ...]] = {
    "latents_mean": (None, [-1.6, 1.9, -1.4, 2.5]),
    "latents_std": (None, [8.5, 5.9, 6.5, 5.2]),
    "scaling_factor": (0.5, 0.18215),
    "shift_factor": (None, 0.0, 0.3),
    "force_upcast": (True, False),
}
INDEX: dict[str, tuple[Any, ...]] = {
    "force_zeros_for_empty_prompt": (True, False),
    "add_watermarker": (None, False, True),
    "requires_safety_checker": (False, True),
    "safety_checker": ([None, None],),
}


UNET: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (True, False),
    "flip_sin_to_cos": (True, False),
    "freq_shift": (0, 1),
    "act_fn": ("silu", "gelu", "mish"),
    "norm_eps": (1e-5, 1e-3),
    "use_linear_projection": (True, False),
    "only_cross_attention": (True, False),
    "upcast_attention": (True, False),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "resnet_out_scale_factor": (1.0, 2.0),
    "resnet_skip_time_act": (True, False),
    "time_embedding_type": ("positional", "fourier"),
    "time_embedding_dim": (None, 16),
    "timestep_post_act": (None, "silu"),
    "time_embedding_act_fn": (None, "silu"),
    "conv_in_kernel": (3, 1),
    "conv_out_kernel": (3, 1),
    "class_embed_type": (None, "timestep"),
    "num_class_embeds": (None, 3),
    "encoder_hid_dim": (None, 32),
    "mid_block_only_cross_attention": (None, True),
    "cross_attention_norm": (None, "layer_norm"),
    "dropout": (0.0, 0.3),
    "attention_type": ("default", "gated"),
}
"""Keys of the UNet that its class acts on."""
TEXT: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("quick_gelu", "gelu"),
    "eos_token_id": (2, 999),
    "layer_norm_eps": (1e-5, 1e-2),
    "num_hidden_layers": (2, 3),
    "attention_dropout": (0.0, 0.5),
    "use_attention_mask": (False, True),
}


@st.composite
def scheduler_configs(draw: st.DrawFn) -> dict[str, Any]:
    """A class and some of its keys, each with a legal value; the rest is left to its defaults."""
    name = draw(st.sampled_from(SCHEDULERS))
    config: dict[str, Any] = {"_class_name": name}
    for key, parameter in inspect.signature(getattr(diffusers, name).__init__).parameters.items():
        if isinstance(parameter.default, bool):
            values: tuple[Any, ...] = (True, False)
        else:
            values = CHOICES.get(key, ())
        if values and draw(st.integers(0, 2)) == 0:
            config[key] = draw(st.sampled_from(values))
    return config


def chosen(keys: dict[str, tuple[Any, ...]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {}, optional={key: st.sampled_from(values) for key, values in keys.items()}
    )


def few(keys: dict[str, tuple[Any, ...]]) -> st.SearchStrategy[dict[str, Any]]:
    """At most three of the keys: of many at once, one that is refused would hide the others."""
    names = st.lists(st.sampled_from(sorted(keys)), max_size=3, unique=True)
    return names.flatmap(
        lambda names: st.fixed_dictionaries({name: st.sampled_from(keys[name]) for name in names})
    )


def hold(folder: Path, steps: int, guidance: float, changed: set[str]) -> None:
    """Near to diffusers, or refused with the name of a key, class or file that was changed."""
    try:
        bundle = opened(folder, folder.parent / "bundle")
    except CheckpointError as error:
        text = str(error)
        assert any(name in text for name in changed), text
        event("refused")
        return
    near = distance(bundle, max(steps, bundle.least_steps), guidance)
    assert min(near.values()) >= NEAR_DB, near
    event("near")


@settings(max_examples=8, suppress_health_check=list(HealthCheck))
@given(
    form=st.sampled_from(["tiny-sd", "tiny-sdxl"]),
    scheduler=scheduler_configs(),
    disagrees=st.booleans(),
    vae=chosen(VAE),
    index=chosen(INDEX),
    steps=st.integers(1, 4),
    guidance=st.sampled_from([0.0, 4.0]),
)
@example("tiny-sdxl", {"_class_name": "EulerDiscreteScheduler"}, False,
         {"latents_mean": [-1.6, 1.9, -1.4, 2.5], "latents_std": [8.5, 5.9, 6.5, 5.2],
          "scaling_factor": 0.5}, {}, 2, 0.0)  # fmt: skip
@example("tiny-sd", {"_class_name": "DDIMScheduler"}, False, {}, {}, 4, 4.0)
@example("tiny-sd", {"_class_name": "DDPMScheduler"}, False, {}, {}, 4, 4.0)
@example("tiny-sd", {"_class_name": "PNDMScheduler"}, False, {}, {}, 4, 4.0)
@example("tiny-sdxl", {"_class_name": "TCDScheduler"}, False, {}, {}, 4, 0.0)
@example("tiny-sdxl", {"_class_name": "HeunDiscreteScheduler"}, True, {}, {}, 2, 0.0)
def test_any_legal_setting_draws_as_diffusers_or_is_refused(
    form: str,
    scheduler: dict[str, Any],
    disagrees: bool,
    vae: dict[str, Any],
    index: dict[str, Any],
    steps: int,
    guidance: float,
) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = copied(form, Path(scratch) / "model")
        file = folder / "scheduler" / "scheduler_config.json"
        kept = read_json(file) if disagrees else {}
        write_json(
            file, kept | {k: v for k, v in scheduler.items() if not (disagrees and k[0] == "_")}
        )
        index = index | {"scheduler": ["diffusers", scheduler["_class_name"]]}
        if form == "tiny-sd":
            index.pop("force_zeros_for_empty_prompt", None)
        edit_json(folder / "model_index.json", **index)
        edit_json(folder / "vae" / "config.json", **vae)
        hold(folder, steps, guidance, {*index, *vae, scheduler["_class_name"]})


@settings(max_examples=5, suppress_health_check=list(HealthCheck))
@given(
    form=st.sampled_from(["tiny-sd", "tiny-sdxl"]),
    unet=few(UNET),
    text=few(TEXT),
    vae=chosen({"mid_block_add_attention": (True, False), "use_post_quant_conv": (True, False)}),
)
def test_any_architecture_draws_as_diffusers_or_is_refused(
    form: str, unet: dict[str, Any], text: dict[str, Any], vae: dict[str, Any]
) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = copied(form, Path(scratch) / "model")
        for part, changes in (("unet", unet), ("text_encoder", text), ("vae_decoder", vae)):
            try:
                redraw(folder, part, **changes)
            except (ValueError, TypeError, NotImplementedError):
                reject()  # the class itself has no such combination
        hold(folder, 2, 0.0, {*unet, *text, *vae})
