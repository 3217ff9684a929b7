"""Settings of a training run that are not its files or how batches are drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass

SCHEDULES = ("constant", "cosine", "wsd")
_DECAY, _LAST = 0.3, 0.01  # of "wsd": last part of the run, and the part of the rate at its end


@dataclass(frozen=True)
class Settings:
    """Settings of a run that are not its files or its `Sampling`.

    Attributes:
        train: weights to train, one of `trained.TRAINED`.
        rank: of the updates of train "lora".
        steps: steps of the optimizer.
        minutes: end before that number of steps after this time of training, of all sittings together; None: no limit.
        rate: learning rate of AdamW.
        encoder_rate: that of the image encoder and of the projection of its tokens; None: the encoder stays as it is.
        warmup: steps over which the rates rise.
        schedule: "constant"; "cosine": from there they fall to 0 at the end of the run; or "wsd" (warm-up, stable,
            decay): over the last 30 % of the run they fall to 1 % in a line. The end is the last of the steps, or of
            the minutes if that is sooner: with these, rates depend on the clock.
        adam_8bit: keep the optimizer's moments in 8 bits; needs bitsandbytes.
        gamma: of min-SNR.
        ema: decay of the averaged weights, which are measured and saved.
        accumulate: batches per step of the optimizer.
        checkpointing: recompute blocks in the backward pass.
        precision: "no", "fp16" or "bf16"; None: as Accelerate is configured, or else "no".
        save_every: steps between checkpoints.
        validation: subjects that are held out, the last ones by name.
        validate_every: steps between validations; 0: at the end only.
        validation_steps: denoising steps of their views.
        guidance: guidance scale of these views and of the trained checkpoint; None: the parent's.
        portrait_angle: degrees from the front within which a view may be the portrait.
        seed: seed of everything that is drawn.
        cpu: train on the CPU.
    """

    train: str = "new"
    rank: int = 16
    steps: int = 10000
    minutes: float | None = None
    rate: float = 1e-4
    encoder_rate: float | None = None
    warmup: int = 200
    schedule: str = "constant"
    adam_8bit: bool = False
    gamma: float = 5.0
    ema: float = 0.999
    accumulate: int = 1
    checkpointing: bool = False
    precision: str | None = None
    save_every: int = 500
    validation: int = 1
    validate_every: int = 0
    validation_steps: int = 25
    guidance: float | None = None
    portrait_angle: float = 35.0
    seed: int = 0
    cpu: bool = False

    def rate_at(self, step: int, passed: float = 0.0) -> float:
        """Compute the learning rate of a step.

        Args:
            step: number of the step.
            passed: fraction of the minutes that is over.
        """
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.rate
        if self.schedule == "wsd":
            left = 1 - max(step / self.steps, passed)
            return self.rate * max(min(left / _DECAY, 1.0), _LAST)
        done = max((step - self.warmup) / max(self.steps - self.warmup, 1), passed)
        return self.rate * (1 + math.cos(math.pi * min(done, 1.0))) / 2
