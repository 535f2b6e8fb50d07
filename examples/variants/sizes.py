"""How much every stage trains and measures: the full run, and a quick one that shows only that it runs."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Settings of a run; steps are optimiser steps.

    Attributes:
        layers, width, expert_width: Of the model; it has eight experts, top-2.
        window: Tokens of a training sequence.
        batch: Sequences of a step, of all stages but the last two.
        pretraining, domain, chat, format: Steps.
        preference, preference_batch: Steps, and pairs of a step.
        reinforcement, prompts, answers: Steps; problems of a step, and answers drawn for each.
        questions: Held-out questions that answers are measured on.
        calibration_tokens: For `moemerge calibrate`, per variant.
    """

    layers: int = 3
    width: int = 128
    expert_width: int = 192
    window: int = 256
    batch: int = 16
    pretraining: int = 1500
    domain: int = 150
    chat: int = 200
    format: int = 300
    preference: int = 40
    preference_batch: int = 16
    reinforcement: int = 200
    prompts: int = 16
    answers: int = 8
    questions: int = 256
    calibration_tokens: int = 8192


FULL = Size()
QUICK = Size(
    layers=2,
    width=64,
    expert_width=64,
    window=128,
    batch=4,
    pretraining=6,
    domain=2,
    chat=3,
    format=3,
    preference=2,
    preference_batch=2,
    reinforcement=2,
    prompts=2,
    answers=2,
    questions=8,
    calibration_tokens=512,
)
