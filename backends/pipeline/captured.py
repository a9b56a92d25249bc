"""A whole image on the device, without waiting in between; on a GPU as one CUDA graph.

Text encoders, the encoder of a picture where there is one to start from, all steps with the
scheduler's arithmetic, decoder and conversion to uint8 run in one go. What goes in is token ids,
the picture and the FP32 noise of every step, drawn on the CPU from the same
generators as in `Pipeline`, so an image is the same whichever way it is made. A batch of
one at 512 pixels is some two thousand small kernels: launched one by one they cost more than they
compute, replayed as one graph they do not. Of many images of one prompt (`Pipeline.frames`) the
text encoders run once, and the graph begins with what they gave.

Works over the sessions of any backend that run on torch's current stream: `run` takes device
tensors, launches, does not wait, and gives device tensors. The same code runs uncaptured where
`capture` is False or the device is the CPU, so it is tested without a GPU.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from backends.base import BackendError, UnsupportedError
from backends.nvidia.gpu import first_cause, memory_errors, ran_out
from backends.pipeline.conditioning import Conditioning
from backends.pipeline.linear import LinearSchedule, read_schedule
from backends.pipeline.output import Output, Timings
from backends.pipeline.pipeline import Pipeline, non_finite
from backends.pipeline.prompts import TOKENS, ImageCall
from backends.pipeline.slot import Slot

WARM_UP = 2
"""Runs before a capture: libraries pick their algorithms and take their workspaces in them."""


class DevicePipeline(Pipeline):
    """Prompts to images in one go.

    Args:
        capture: record the whole image as a CUDA graph and replay it; on the CPU it runs as it is.
        stream: the CUDA stream to run on (None: one of its own).
        parallel_text: run the text encoders on two streams. The sessions must allow it.

    A call has no stage times. With `staged` set it takes the step-by-step order of `Pipeline` and
    has them; a captured pipeline has none to give.
    """

    def __init__(
        self,
        *args: Any,
        capture: bool,
        stream: Any = None,
        parallel_text: bool = False,
        **rest: Any,
    ) -> None:
        super().__init__(*args, **rest)
        self.staged, self.capture, self.can_stage = False, capture, not capture
        self.parallel_text = parallel_text
        self._stream: Any = stream
        self._side: Any = None
        self._pool: Any = None
        self._slots: dict[tuple[int, int, int, bool, bool], Slot] = {}
        self._schedules: dict[tuple[int, int], LinearSchedule] = {}
        self._readable: dict[tuple[int, int], bool] = {}
        self._constants: dict[tuple[Any, ...], Tensor] = {}

    # ---- the call

    def _draw(self, call: ImageCall) -> Output:
        held = call.conditioning is not None and not self.capture
        if self.staged or self._embedding_cache or held:
            return super()._draw(call)
        for part in self.parts:
            self.session(part)
        with torch.inference_mode(), memory_errors(f"on {len(call.prompts)} prompts"):
            if not self.capture and not self._in_one_go(call.steps, call.first):
                return super()._draw(call)
            started = time.perf_counter_ns()
            with self._on_stream():
                slot = self._slot(call)
                self._fill(slot, call)
                slot.upload()
                if self.capture and self.is_cuda and slot.graph is None:
                    self._record(slot)
                if slot.graph is None:
                    self.draw(slot)
                else:
                    slot.graph.replay()
                slot.download()
            if self.is_cuda:
                self._stream.synchronize()
            if not bool(slot.host_finite):
                raise non_finite()
            images = slot.host_image.numpy().copy()
            total = (time.perf_counter_ns() - started) / 1e9
        return Output(images, Timings(None, [], None, None, total), nfe=slot.nfe)

    def schedule(self, steps: int, first: int = 0) -> LinearSchedule:
        """The scheduler's arithmetic at `steps` from the `first` that runs, read once.

        Raises:
            UnsupportedError: it is not a sum of samples, model outputs and noises.
        """
        if (steps, first) not in self._schedules:
            scheduler = self.bundle.scheduler(self.recipe.scheduler)
            self._schedules[steps, first] = read_schedule(scheduler, steps, first)
        return self._schedules[steps, first]

    def _in_one_go(self, steps: int, first: int) -> bool:
        """Whether the scheduler can be read; where it cannot, step by step is as right."""
        if (steps, first) not in self._readable:
            try:
                self.schedule(steps, first)
            except UnsupportedError:
                self._readable[steps, first] = False
            else:
                self._readable[steps, first] = True
        return self._readable[steps, first]

    def close(self) -> None:
        self._slots.clear()
        self._constants.clear()
        super().close()
        if self._stream is not None:
            torch.cuda.empty_cache()

    # ---- inputs

    @property
    def device(self) -> torch.device:
        return torch.device(self.session("unet").device)

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def text_encoders(self) -> list[str]:
        return [part for part in self.parts if part.startswith("text_encoder")]

    def _slot(self, call: ImageCall) -> Slot:
        batch, told = len(call.prompts), call.conditioning is not None
        refuses = not told and self._encodes_refused(call)
        key = (batch, call.steps, call.first, refuses, told)
        if key not in self._slots:
            width, height, scale = self.shapes.width, self.shapes.height, self.bundle.vae_scale
            self._slots[key] = Slot.make(
                self.schedule(call.steps, call.first),
                ids=(0,) if told else (len(self.text_encoders), batch, TOKENS),
                latents=(batch, self.bundle.latent_channels, height // scale, width // scale),
                image=(batch, height, width, 3),
                device=self.device,
                refuses=refuses,
            )
        return self._slots[key]

    def _encodes_refused(self, call: ImageCall) -> bool:
        """Whether the negative prompt is encoded: zeros may stand for one that is not given."""
        if call.negative is not None:
            return True
        return self.recipe.guided and not self.bundle.force_zeros

    def _fill(self, slot: Slot, call: ImageCall) -> None:
        """Token ids or what they were encoded to, pictures, and each image's noise in the order in
        which `Pipeline.denoise` draws it."""
        if call.conditioning is None:
            torch.stack(self.tokenise(call.prompts), out=slot.host_ids)
        else:
            slot.hold(call.conditioning)
        if slot.refuses:
            refused = call.negative or [""] * len(call.prompts)
            torch.stack(self.tokenise(refused), out=slot.host_refused)
        for row in range(len(slot.host_picture)):
            picture = call.starts[row % len(call.starts)]
            slot.host_picture[row] = torch.tensor(picture.pixels)
        one = (1, *slot.host_noise.shape[2:])
        for image, seed in enumerate(call.seeds):
            generator = torch.Generator("cpu").manual_seed(seed)
            for draw in slot.host_noise:
                draw[image : image + 1] = torch.randn(one, generator=generator)

    # ---- the image

    def draw(self, slot: Slot) -> None:
        """Launch every op of the images, from `slot.ids` or `slot.told`, `slot.picture` and
        `slot.noise` to `slot.image`."""
        latents = self._denoise(slot.told or self._told(slot), slot)
        sample = self.run(f"{self.decoder}_decoder", latent_sample=latents)["sample"].float()
        # A sum is finite only if every element is; the cast rounds, as in Pipeline.to_uint8.
        slot.finite.copy_(torch.isfinite(sample.sum()))
        image = (sample * 127.5).add_(128).clamp_(0.5, 255.5).to(torch.uint8)
        slot.image.copy_(image.permute(0, 2, 3, 1))

    def condition(
        self, prompts: Sequence[str], negative: Sequence[str] | None = None
    ) -> Conditioning:
        """Return what `Pipeline` does, of a captured image made on its stream: it is read there."""
        if not self.capture:
            return super().condition(prompts, negative)
        with self._on_stream():
            told = super().condition(prompts, negative)
            if self.is_cuda:
                self._stream.synchronize()
        return told

    def _told(self, slot: Slot) -> Conditioning:
        """What the slot's token ids are encoded to."""
        conditioning = self.join(self._encode(slot.ids))
        refused = self.join(self._encode(slot.refused)) if slot.refuses else None
        return self.with_negative(conditioning, refused)

    def _encode(self, ids: Tensor) -> list[dict[str, Tensor]]:
        """Every text encoder on its rows of `ids`; the first beside the others where it may be."""
        first, *others = self.text_encoders
        if not (self.is_cuda and self.parallel_text and others):
            return [
                self.run(part, input_ids=rows)
                for part, rows in zip(self.text_encoders, ids, strict=True)
            ]
        main = torch.cuda.current_stream()
        self._side = self._side or torch.cuda.Stream()
        # Its tensors live until the image is drawn and it starts after `main` only, so their
        # memory is not taken again while `main` may still read them.
        self._side.wait_stream(main)
        with torch.cuda.stream(self._side):
            encoded = [self.run(first, input_ids=ids[0])]
        encoded += [
            self.run(part, input_ids=rows) for part, rows in zip(others, ids[1:], strict=True)
        ]
        main.wait_stream(self._side)
        return encoded

    def _denoise(self, conditioning: Conditioning, slot: Slot) -> Tensor:
        """Final latents, float32, as `Pipeline.denoise` computes them."""
        schedule, calls = slot.schedule, self._unet_calls(conditioning)
        batch = slot.noise.shape[1]
        copies = len(calls[0]["encoder_hidden_states"]) // batch
        samples, outputs = [slot.noise[0] * schedule.first], list[Tensor]()
        if schedule.picture:
            given = slot.picture.permute(0, 3, 1, 2).float() / 127.5 - 1
            encoded = self.run(f"{self.encoder}_encoder", image=given.contiguous())
            samples[0] = samples[0] + encoded["latent_sample"].float() * schedule.picture
        drawn = iter(slot.noise[1:])
        noises: list[Tensor | None] = []
        predictions = 0
        with contextlib.ExitStack() as held:
            if len(calls) == 1:
                prompt = calls[0]["encoder_hidden_states"]
                held.enter_context(self.session("unet").holding(prompt))
            for index, step in enumerate(schedule.steps):
                scaled = samples[-1]
                if step.input_factor != 1.0:
                    scaled = scaled * step.input_factor
                predicted = torch.cat([
                    self.run(
                        "unet",
                        sample=torch.cat([scaled] * copies) if copies > 1 else scaled,
                        timestep=self._constant("timestep", torch.tensor([step.timestep])),
                        **inputs,
                    )["out_sample"].float()
                    for inputs in calls
                ])  # fmt: skip
                predictions += len(predicted)
                if self.recipe.guided:
                    empty, prompted = predicted.chunk(2)
                    predicted = empty + self.recipe.guidance * (prompted - empty)
                outputs.append(predicted)
                noises.append(next(drawn) if step.draws else None)
                samples.append(schedule.next_sample(index, samples, outputs, noises))
        slot.nfe = predictions // batch
        return samples[-1]

    def unet_inputs(self, conditioning: Conditioning) -> dict[str, Tensor]:
        """Return `Pipeline`'s, the constant ones on the device: a capture copies nothing in."""
        of_prompt = (
            conditioning.hidden_states,
            conditioning.text_embeds,
            *conditioning.context.values(),
        )
        return {
            name: tensor
            if any(tensor is one for one in of_prompt)
            else self._constant(name, tensor)
            for name, tensor in super().unet_inputs(conditioning).items()
        }

    def _constant(self, name: str, host: Tensor) -> Tensor:
        """`host` on the device, always the same tensor for the same content."""
        key = (name, tuple(host.shape), tuple(host.flatten().tolist()))
        if key not in self._constants:
            self._constants[key] = host.to(self.device)
        return self._constants[key]

    # ---- CUDA

    def _on_stream(self) -> AbstractContextManager[Any]:
        if not self.is_cuda:
            return contextlib.nullcontext()
        self._stream = self._stream or torch.cuda.Stream()
        # Weights may still be on their way to the device, on the stream of whoever loaded them.
        self._stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self._stream)

    def _record(self, slot: Slot) -> None:
        """Capture the image of `slot`, whose inputs are in place.

        Raises:
            BackendError: a session waits for the device or takes memory of its own in between.
        """
        for _ in range(WARM_UP):
            self.draw(slot)
        self._stream.synchronize()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                self.draw(slot)
        except RuntimeError as error:
            cause = first_cause(error)
            if ran_out(error) or isinstance(cause, BackendError):
                raise cause from None
            raise BackendError(
                f"the image could not be captured as one CUDA graph ({self.backend.name})",
                f"{type(cause).__name__}: {str(cause).strip().splitlines()[0][:500]}",
                "use an order without capture: torch:mode=compile, trt:graph=part",
            ) from error
        slot.graph = graph
