"""Adversarial diffusion distillation: the trainer, and the small model that ships."""
