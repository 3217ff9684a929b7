"""Evaluation of a pipeline on held-out heads, with baselines and ablations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor

from gafext import heads, images
from gafext.cameras import Cameras, orbit
from gafext.conditions import DEFAULT_SAMPLE_SIZE
from gafext.evaluation.measures import consistency, face_psnr, patch_distance, psnr, sharpness, ssim
from gafext.heads import Renders
from gafext.output import MultiViewOutput
from gafext.pipeline import MultiViewDiffusionPipeline
from gafext.schedulers import scheduler_class

PORTRAIT_AZIMUTH, PORTRAIT_ELEVATION = 25.0, 8.0  # degrees: largest angles of the portraits of held-out heads
MEAN_OF = 64  # number of training heads in the mean image
NEAREST_OF, NEAREST_SIZE = 256, 32  # training heads, and pixels of their portraits, among which the nearest is sought
STEPS, GUIDANCE_SCALES = (5, 10, 25, 50), (1.0, 2.0, 4.0, 7.5, 10.0)


@dataclass(frozen=True)
class Subject:
    """Held-out head: its portrait, and the ground truth of its views."""

    identity: int
    portrait: Tensor  # [3,S,S] in [0,1]
    cameras: Cameras
    views: Renders  # [V,...]


def portrait_camera(identity: int) -> Cameras:
    """Return the camera of a held-out head's portrait, which depends only on the identity."""
    numbers = torch.Generator().manual_seed(identity)
    azimuth, elevation = (2 * torch.rand(2, generator=numbers, dtype=torch.float64) - 1).tolist()
    return orbit(1, elevation=PORTRAIT_ELEVATION * elevation, azimuth_start=PORTRAIT_AZIMUTH * azimuth)


def subjects(
    count: int,
    size: int,
    cameras: Cameras | None = None,
    *,
    first: int = 0,
    of: Sequence[int] = heads.TEST_IDENTITIES,
) -> list[Subject]:
    """Render portraits and views of held-out heads.

    Args:
        count: number of heads, at least 1.
        size: side of the images in pixels.
        cameras: cameras of the views; None: an orbit of 4.
        first: number of identities to skip.
        of: identities to take them from.

    Raises:
        ValueError: `count` is over the number of identities.
    """
    if not 0 <= first < len(of):
        raise ValueError(f"first: expected 0 to {len(of) - 1}, got {first}")
    identities = list(of[first : first + count])
    if count < 1 or len(identities) < count:
        raise ValueError(f"heads: expected 1 to {len(of) - first}, got {count}")
    cameras = cameras or orbit(4)
    made = []
    for identity in identities:
        head = heads.make_heads([identity])
        portrait = heads.render(head, portrait_camera(identity).w2c, size).rgb[0, 0]
        views = heads.render(head, cameras.w2c, size, fov=cameras.fov)
        made.append(Subject(identity, portrait, cameras, Renders(*(tensor[0] for tensor in views))))
    return made


def as_portrait(picture: Tensor) -> PIL.Image.Image:
    """Convert an image [3,S,S] in [0,1] to the 8-bit PIL image that a user would pass."""
    return images.to_pil(picture[None])[0]


@dataclass(frozen=True)
class Scores:
    """Line of the table: means over heads and views."""

    name: str
    psnr: float  # dB
    ssim: float
    face: float  # dB: the PSNR over the face, of the views that see it
    sharpness: float  # share of the truth's gradient energy
    patches: float  # distance of patches; 0 for the truth
    consistency: float  # dB

    @classmethod
    def of(cls, name: str, who: list[Subject], made: list[Tensor]) -> Scores:
        """Score generated images.

        Args:
            name: name of the line.
            who: the subjects.
            made: images [V,3,S,S] in [0,1] of each subject.
        """
        pictures = torch.cat(made).clamp(0, 1)
        truth, _, alpha, _, face = (torch.cat(images) for images in zip(*(s.views for s in who), strict=True))
        agreed = [consistency(views.clamp(0, 1), s.views.depth, s.cameras) for views, s in zip(made, who, strict=True)]
        return cls(
            name,
            psnr=psnr(pictures, truth).mean().item(),
            ssim=ssim(pictures, truth).mean().item(),
            face=face_psnr(pictures, truth, face).nanmean().item(),
            sharpness=sharpness(pictures, truth, alpha),
            patches=patch_distance(pictures, truth),
            consistency=torch.tensor(agreed).nanmean().item(),
        )


class _WithoutImageTokens(MultiViewDiffusionPipeline):
    """Pipeline without image tokens."""

    def encode_portraits(self, portraits, *, guided=False):
        return None


class Evaluation:
    """Evaluation of a pipeline on held-out heads.

    Args:
        pipe: pipeline to evaluate.
        count: number of heads.
        cameras: cameras of the views; None: an orbit of 4.
        first: number of held-out identities to skip, so that settings can be chosen on other heads than are reported.
        progress: called with the name of each line before it is computed.
        options: arguments of every call, such as num_inference_steps, guidance_scale, generator and upsample.
    """

    def __init__(
        self,
        pipe: MultiViewDiffusionPipeline,
        count: int,
        cameras: Cameras | None = None,
        *,
        first: int = 0,
        progress: Callable[[str], None] = lambda name: None,
        **options: Any,
    ):
        self.pipe, self.progress = pipe, progress
        self.options = {"generator": 0, "num_inference_steps": 25, "upsample": "auto", **options}
        self.options |= {"output_type": "pt", "progress_bar": False}
        latent_size = pipe.unet.config.sample_size or DEFAULT_SAMPLE_SIZE
        assert isinstance(latent_size, int)  # UNetConfig refuses a size that is not square
        size = latent_size * pipe.vae.config.factor * (1 if self.options["upsample"] == "none" else 2)
        self.subjects = subjects(count, size, cameras, first=first)
        self.cameras = self.subjects[0].cameras

    def generate(
        self,
        *,
        pipe: MultiViewDiffusionPipeline | None = None,
        cameras: Cameras | None = None,
        normals: Callable[[Subject], Tensor | None] = lambda subject: subject.views.normals,
        **options: Any,
    ) -> list[Tensor]:
        """Generate the views [V,3,S,S] in [0,1] of every subject, on the CPU.

        Args:
            pipe: pipeline to use; None: the evaluated one.
            cameras: cameras to pass; None: those of the subjects.
            normals: function from a subject to the normal maps [V,3,S,S] to pass, or None.
            options: arguments that replace those of the evaluation.
        """
        call = pipe or self.pipe
        made = []
        for subject in self.subjects:
            maps = normals(subject)
            maps = None if maps is None or not self.pipe.takes_normals else list(maps)
            portrait = as_portrait(subject.portrait)
            output = call(portrait, cameras or self.cameras, maps, **{**self.options, **options})
            assert isinstance(output, MultiViewOutput) and isinstance(output.images, Tensor)  # output_type is "pt"
            made.append(output.images.cpu())
        return made

    def _score(self, name: str, pictures: Callable[[], list[Tensor]]) -> Scores:
        self.progress(name)
        return Scores.of(name, self.subjects, pictures())

    def main(self) -> list[Scores]:
        """Score the pipeline with the true normal maps, and without normal maps."""
        return [
            self._score("generated", self.generate),
            self._score("generated, no normal maps given", lambda: self.generate(normals=lambda subject: None)),
        ]

    def baselines(self) -> list[Scores]:
        """Score results that do not need the U-Net."""
        trained_on = heads.make_heads(heads.TRAIN_IDENTITIES[:MEAN_OF])
        size = self.subjects[0].portrait.shape[-1]

        def mean() -> list[Tensor]:
            views = heads.render(trained_on, self.cameras.w2c, size, fov=self.cameras.fov).rgb.mean(0)
            return [views] * len(self.subjects)

        def nearest(subject: Subject) -> Tensor:
            """Render the views of the training head whose portrait is most like the subject's."""
            known = heads.make_heads(heads.TRAIN_IDENTITIES[:NEAREST_OF])
            portraits = heads.render(known, portrait_camera(subject.identity).w2c, NEAREST_SIZE).rgb[:, 0]
            own = F.interpolate(subject.portrait[None], NEAREST_SIZE, mode="area")
            index = int((portraits - own).square().flatten(1).mean(1).argmin())
            head = heads.make_heads([heads.TRAIN_IDENTITIES[index]])
            return heads.render(head, self.cameras.w2c, size, fov=self.cameras.fov).rgb[0]

        def codec(subject: Subject) -> Tensor:
            return self.pipe.decode(self.pipe.encode(subject.views.rgb)).cpu()

        with torch.no_grad():
            return [
                self._score("the truth", lambda: [subject.views.rgb for subject in self.subjects]),
                self._score("codec round trip", lambda: [codec(subject) for subject in self.subjects]),
                self._score("copy of the portrait", lambda: [s.portrait.expand_as(s.views.rgb) for s in self.subjects]),
                self._score("mean picture", mean),
                self._score("nearest training head", lambda: [nearest(subject) for subject in self.subjects]),
            ]

    def ablations(self, only: Iterable[str] | None = None) -> list[Scores]:
        """Score variants of "generated" with one input, setting or part of the network changed.

        Args:
            only: names of the lines to compute; None: all.

        Raises:
            ValueError: a name is unknown.
        """
        changes = self._changes()
        names = list(changes) if only is None else list(only)
        if unknown := [name for name in names if name not in changes]:
            raise ValueError(f"only: expected some of {list(changes)}, got {unknown[0]!r}")
        return [self._score(name, lambda change=changes[name]: self.generate(**change)) for name in names]

    def _changes(self) -> dict[str, dict[str, Any]]:
        """Return the arguments of `generate` for each line of the ablations."""
        parts, config, changes = self.pipe.components, self.pipe.unet.config, {}
        if config.image_attention is not None:
            changes["no image tokens"] = {"pipe": _WithoutImageTokens(**parts)}
        if any(block.attn_cv is not None for block in self.pipe.unet.transformer_blocks()):
            changed = {**parts, "unet": _without_cross_view(self.pipe.unet)}
            changes["attn_cv off"] = {"pipe": MultiViewDiffusionPipeline(**changed)}
        if self.pipe.takes_normals:
            if self.pipe.head_fitter is not None:
                changes["neutral normals"] = {"normals": lambda subject: None, "fit": False}
            changes["zero normals"] = {"normals": lambda subject: torch.full_like(subject.views.normals, 0.5)}
        changes["wrong cameras"] = {"cameras": self.cameras.with_poses(self.cameras.w2c.roll(1, dims=0))}
        changes |= {f"{steps} steps": {"num_inference_steps": steps} for steps in STEPS}
        changes |= {f"guidance {scale:g}": {"guidance_scale": scale} for scale in GUIDANCE_SCALES}
        for solver in ("ddim", "dpm++"):
            scheduler = scheduler_class(solver).from_config(self.pipe.scheduler.config)
            other = MultiViewDiffusionPipeline(**{**parts, "scheduler": scheduler})
            changes |= {f"{solver}, {n} steps": {"pipe": other, "num_inference_steps": n} for n in (10, 25)}
        return changes

    def figure(self, made: list[Tensor]) -> PIL.Image.Image:
        """Draw each head's portrait, and beside it three rows: normal maps, generated views, ground truth.

        Args:
            made: generated views [V,3,S,S] of each subject.
        """
        blocks = []
        for subject, pictures in zip(self.subjects, made, strict=True):
            rows = (subject.views.normals, pictures.clamp(0, 1), subject.views.rgb)
            blank = torch.ones_like(subject.portrait)
            columns = zip((blank, subject.portrait, blank), rows, strict=True)
            blocks += [torch.cat([first, *row], dim=2) for first, row in columns]
        return as_portrait(torch.cat(blocks, dim=1))


def _without_cross_view(unet):
    unet = deepcopy(unet)
    for block in unet.transformer_blocks():
        block.attn_cv = block.norm_cv = None
    return unet


def table(lines: Iterable[Scores]) -> str:
    """Format lines as a table for a terminal."""
    lines = list(lines)
    width = max(len(line.name) for line in lines)
    head = f"{'':{width}}  PSNR dB   SSIM  face dB  sharpness  patches  consistency dB"
    rows = [
        f"{s.name:{width}}  {s.psnr:7.2f}  {s.ssim:5.3f}  {s.face:7.2f}  {s.sharpness:9.2f}  {s.patches:7.0f}"
        f"  {s.consistency:14.2f}"
        for s in lines
    ]
    return "\n".join([head, *rows])
