"""Find what blurs the views of a model: scores of its parts, each fed with the truth, and of whole runs.

Heads from the held-out identities after the first 100, which no reported number is of, and as many training heads.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from data import generator, normalized
from torch import Tensor
from torch.nn import functional as F

from gafext import MultiViewDiffusionPipeline, heads
from gafext.evaluation import Scores, Subject, as_portrait, subjects, table
from gafext.schedulers import schedule
from gafext.training.denoiser import diffuse

LEVELS = (999, 900, 750, 500, 250, 100)  # timesteps
FIRST = 100


class Parts:
    """Parts of a pipeline, and the truth of heads."""

    def __init__(self, pipe: MultiViewDiffusionPipeline, who: list[Subject], large: list[Subject]):
        self.pipe, self.who, self.large = pipe, who, large
        self.alphas = schedule.alphas_cumprod(pipe.scheduler.config)

    def codec(self, subject: Subject) -> Tensor:
        return self.pipe.decode(self.pipe.encode(subject.views.rgb))

    def upsampled(self, subject: Subject) -> Tensor:
        """Upsample the true latents of a large image's half."""
        assert self.pipe.upsampler is not None
        return self.pipe.decode(self.pipe.upsampler(self.pipe.encode(F.avg_pool2d(subject.views.rgb, 2))))

    def one_step(self, subject: Subject, timestep: int) -> Tensor:
        """Predict the clean latents in one step from true ones at a noise level, all views at once."""
        pipe, unet = self.pipe, self.pipe.unet
        assert pipe.image_encoder is not None
        size = pipe.image_encoder.config.image_size
        portrait = normalized(F.interpolate(subject.portrait[None], size, mode="area"))
        tokens = unet.image_projection(pipe.image_encoder(portrait).last_hidden_state)
        clean, normals = pipe.encode(subject.views.rgb), pipe.encode(subject.views.normals)
        noise = torch.randn(clean.shape, generator=generator(0, subject.identity))
        alpha = self.alphas[timestep]
        noised, _ = diffuse(clean, noise, alpha.expand(len(clean)))
        pose = subject.cameras.w2c[:, :3].flatten(1).float()
        made = unet(torch.cat([noised, normals], 1), timestep, pose=pose, image_embeds=tokens, num_views=len(clean))
        return pipe.decode(alpha.sqrt() * noised - (1 - alpha).sqrt() * made)

    def run(self, subject: Subject, **options: object) -> Tensor:
        settings = {"num_inference_steps": 25, "upsample": "none", "generator": 0, **options}
        portrait, normals = as_portrait(subject.portrait), list(subject.views.normals)
        output = self.pipe(portrait, subject.cameras, normals, output_type="pt", progress_bar=False, **settings)
        return output.images.cpu()

    @torch.no_grad()
    def lines(self, name: str) -> Iterator[Scores]:
        """Score every part; `name` is that of the heads."""

        def score(part: str, who: list[Subject], make) -> Scores:
            return Scores.of(f"{name}: {part}", who, [make(subject).clamp(0, 1) for subject in who])

        yield score("codec", self.who, self.codec)
        for timestep in LEVELS:
            yield score(f"one step from t={timestep}", self.who, lambda subject, t=timestep: self.one_step(subject, t))
        for options in (*({"guidance_scale": scale} for scale in (1.0, 1.5, 2.0)), {"num_inference_steps": 50}):
            title = ", ".join(f"{key} {value:g}" for key, value in options.items())
            yield score(f"run, {title}", self.who, lambda subject, o=options: self.run(subject, **o))
        yield score("codec, large", self.large, self.codec)
        yield score("upsampler of true latents, large", self.large, self.upsampled)
        yield score("run, large", self.large, lambda subject: self.run(subject, upsample="auto"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", type=Path, help="checkpoint folder; default: the built-in model")
    add("--heads", type=int, default=4)
    add("--json", type=Path)
    args = parser.parse_args()
    pipe = MultiViewDiffusionPipeline.from_pretrained(args.model, device="cpu")
    size = pipe.unet.config.sample_size * pipe.vae.config.factor
    lines: list[Scores] = []
    for name, chosen in (("held out", {"first": FIRST}), ("trained", {"of": heads.TRAIN_IDENTITIES})):
        small, large = (subjects(args.heads, side, **chosen) for side in (size, 2 * size))
        for line in Parts(pipe, small, large).lines(name):
            lines.append(line)
            print(table([line]).splitlines()[-1], flush=True)
    print(table(lines))
    if args.json:
        args.json.write_text(json.dumps([asdict(line) for line in lines], indent=1) + "\n")


if __name__ == "__main__":
    main()
