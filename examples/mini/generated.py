"""Latents that a whole model generates, and the renders that the decoder should make of them."""

from __future__ import annotations

from pathlib import Path

import torch
from data import draw_heads, face_weights, generator, portrait_cameras, view_cameras
from torch import Tensor

from gafext import MultiViewDiffusionPipeline, heads
from gafext.cameras import DEFAULT_FOV, Cameras
from gafext.evaluation import as_portrait

OPTIONS = {"scheduler": "dpm++", "num_inference_steps": 10, "upsample_steps": 1}  # as good as 25 steps of DDIM
VIEWS = 4
FIRST, LIMIT = 16, 240  # heads in the pool, to begin with and at most: 3 MB each
EVERY = 4  # training steps between two new heads


class GeneratedLatents:
    """Pool of heads with generated latents, which grows while it is drawn from.

    Args:
        model: folder of the whole model, whose large latents are generated.
        device: of its networks and of the pool.
        seed: seed of the run.
    """

    def __init__(self, model: Path, device: torch.device, seed: int):
        self.pipe, self.seed = MultiViewDiffusionPipeline.from_pretrained(model, device=device), seed
        self.size = 2 * self.pipe.unet.config.sample_size * self.pipe.vae.config.factor
        self.pool: list[tuple[Tensor, Tensor, Tensor]] = []
        for number in range(FIRST):
            self._add(generator(seed + 3, number))

    def latents(self, head: heads.Heads, portrait: Tensor, w2c: Tensor, normals: Tensor) -> Tensor:
        """Generate what the decoder gets of a head.

        Args:
            head: one head.
            portrait: camera of its portrait [1,1,4,4].
            w2c: cameras [V,4,4].
            normals: their normal maps [V,3,S,S] in [0,1].

        Returns:
            [V,C,h,w] float32, not scaled.
        """
        taken = as_portrait(heads.render(head, portrait, self.size).rgb[0, 0].cpu())
        cameras, options = Cameras(w2c, DEFAULT_FOV), {"output_type": "latent", "progress_bar": False, **OPTIONS}
        made = self.pipe(taken, cameras, list(normals.cpu()), generator=self.seed, **options).images
        return made.float().clone() / self.pipe.vae.config.scaling_factor + self.pipe.vae.config.shift_factor

    def _add(self, random: torch.Generator) -> None:
        head, w2c = draw_heads(1, random, self.pipe.device), view_cameras(1, VIEWS, random)
        true = heads.render(head, w2c, self.size)
        made = self.latents(head, portrait_cameras(1, random), w2c[0], true.normals[0])
        self.pool.append((made, true.rgb[0] * 2 - 1, face_weights(true.face[0])))
        del self.pool[:-LIMIT]

    def draw(self, step: int, count: int) -> tuple[Tensor, ...]:
        """Draw latents [N,C,h,w], images [N,3,S,S] in [-1,1] and weights [N,1,S,S] for a step."""
        random = generator(self.seed + 4, step)
        if step % EVERY == 0:
            self._add(random)
        chosen = torch.randint(len(self.pool), (count,), generator=random).tolist()
        views = torch.randint(VIEWS, (count,), generator=random).tolist()
        rows = [[kept[view] for kept in self.pool[head]] for head, view in zip(chosen, views, strict=True)]
        return tuple(torch.stack(column) for column in zip(*rows, strict=True))
