"""Verifiable rewards: what a sampled text is worth, by rules, beside what the data say is right."""

from mmpo_jax.feedback.rewards import answers, boxes, shapes

__all__ = ["answers", "boxes", "shapes"]
