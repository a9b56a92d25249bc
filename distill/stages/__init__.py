"""The stages of a run, one a file."""

from __future__ import annotations

import importlib

from distill.context import Context
from distill.loop import Trainer

TRAINERS = {
    "autoencoder": "autoencoder:AutoencoderTrainer",
    "tiny-autoencoder": "tiny_autoencoder:TinyAutoencoderTrainer",
    "features": "features:FeaturesTrainer",
    "fid": "fid:FidTrainer",
    "teacher": "teacher:TeacherTrainer",
    "student": "student:StudentTrainer",
}


def trainer(name: str, context: Context) -> Trainer:
    module, _, cls = TRAINERS[name].partition(":")
    stage: Trainer = getattr(importlib.import_module(f"distill.stages.{module}"), cls)(context)
    return stage
