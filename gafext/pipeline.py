"""Pipeline from one portrait to several views: prepare, denoise, finish."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from gafext import images as imaging
from gafext.conditions import Run, RunOptions, check_choice, latent_size, resolve_cameras, rows_together
from gafext.conditions.encoding import PipelineEncoding
from gafext.families import family_of
from gafext.guidance import check_guidance_interval, check_guidance_scale, check_parallel, needs_unconditional
from gafext.mesh import Mesh
from gafext.models.graph import GraphedCall
from gafext.noise import is_seeded, resolve_seeds, view_generators, view_noise
from gafext.ops import memory
from gafext.output import MultiViewOutput
from gafext.portraits.reading import load_portraits
from gafext.portraits.stream import PipelineStream
from gafext.predictor import Predictor
from gafext.schedulers import MAX_STEPS, check_eta, check_steps
from gafext.schedulers.callbacks import StepCallback
from gafext.schedulers.plan import set_timesteps, with_preset
from gafext.upsampler import NOISE_STEP

if TYPE_CHECKING:
    from typing_extensions import Unpack

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
UPSAMPLE = ("auto", "bilinear", "none")
_UPSAMPLED = 1024 * 384  # positions of latents, times channels, that are upsampled together: one of SD's views


class MultiViewDiffusionPipeline(PipelineEncoding, PipelineStream):
    """Generate V consistent views of a head from one portrait.

    Args:
        unet: the multi-view denoiser.
        vae: the autoencoder between images and latents.
        scheduler: the solver, or any scheduler of diffusers for diffusion models.
        image_encoder: CLIP; required if the U-Net attends to the portrait.
        upsampler: network that doubles the size of the latents; None: bilinear interpolation.
        prompt_embeds: text embeddings [1,T,C] for every view, or [V,T,C]; for a family with a negative prompt [2,T,C],
            that of the unconditional pass first; None: zeros.
        guidance_scale: default of a call, 1.0 to 20.0.
        image_normalizer, image_noising_scheduler: what FaceLift's class labels are made with.
        head_detector: finds the head that a portrait is cropped to; None: the centre square is taken.
        head_fitter: fits a drawn head to a portrait, for the normal maps that a call is not given; None: they are the
            neutral head's.

    Raises:
        CheckpointError: the components do not fit together.

    Source: GAF (arXiv 2412.10209) section 3; ImageDream (arXiv 2312.02201) for the dense family.
    """

    _interrupt = False

    @torch.no_grad()
    @memory.release_afterwards
    def __call__(
        self,
        image: Any,
        cameras: Any = None,
        normal_maps: Any = None,
        *,
        callback_on_step_end: Callable[..., dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        progress_bar: bool = True,
        return_dict: bool = True,
        **options: Unpack[RunOptions],
    ) -> MultiViewOutput | list[MultiViewOutput] | tuple[Any]:
        """Generate the views of one portrait, or of each portrait in a list.

        Args:
            image, cameras, normal_maps, options: those of `prepare`, such as num_views, guidance_scale and generator.
            callback_on_step_end: called as (pipeline, step, timestep, {name: tensor}) after each step. It may return a
                dict: `latents` in it replace the current ones; `pred_original_sample` replaces the prediction, and
                the step is taken again from it. `pipeline._interrupt = True`, there or anywhere else during the steps,
                ends them, as in diffusers.
            callback_on_step_end_tensor_inputs: tensors for the callback: "latents" after the step and
                "pred_original_sample", the clean latents predicted at it, for `decode`; [B*V,4,h,w] float32 each.
            progress_bar: show a progress bar.
            return_dict: False: return a tuple of one entry, the `images` of the result, or their list.

        Returns:
            The views of the portrait; a list if `image` is a list or `num_images_per_prompt` is above 1, all of the
            first portrait first.

        Raises:
            ImageError: an image cannot be read.
            CameraError: a camera is not a rigid transform.
            ValueError: an argument is out of range, or counts do not agree.
        """
        run = self.prepare(image, cameras, normal_maps, **options)
        latents = self.denoise(
            run,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            progress_bar=progress_bar,
        )
        result = self.finish(run, latents)
        if return_dict:
            return result
        return ([output.images for output in result] if isinstance(result, list) else result.images,)

    @torch.no_grad()
    def prepare(
        self,
        image: Any,
        cameras: Any = None,
        normal_maps: Any = None,
        *,
        num_views: int | None = None,
        preset: str | None = None,
        num_inference_steps: int | None = None,
        scheduler: str | None = None,
        graph: bool = False,
        parallel: str | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        generator: torch.Generator | int | Sequence[torch.Generator | int] | None = None,
        num_images_per_prompt: int = 1,
        latents: Tensor | None = None,
        renders: Any = None,
        strength: float = 1.0,
        eta: float | None = None,
        upsample: str = "auto",
        upsample_steps: int | None = None,
        output_type: str = "pil",
        matte: bool = False,
        crop: bool = True,
        fit: bool = True,
    ) -> Run:
        """Validate the arguments of a call and encode all inputs that are constant over its steps.

        Args:
            image: a portrait: path, PIL image, array [H,W,3] or tensor [3,H,W], uint8 or float in [0,1], any size and
                mode; or a list of portraits.
            cameras: a `Cameras`, or world-to-camera matrices [V,4,4] with OpenCV axes and a field of view of 30
                degrees; None: an orbit of `num_views`, or the cameras that the checkpoint was trained with.
            normal_maps: V images of camera-space normals, n/2 + 1/2; or a `gafext.mesh.Mesh` to render them of; None:
                those of a drawn head, fitted to the portrait where the checkpoint has a head_fitter, else neutral.
            num_views: V, if no cameras are given; without the reference frame of ImageDream's family. None: 4, or the
                views that the checkpoint was trained with. 4 beside other cameras counts as None.
            preset: "quality", "balanced" or "fast": what it sets is used for options that are None; see `PRESETS`.
            num_inference_steps: 1 to 1000; None: the preset's, 50 without one.
            scheduler: name of the run's solver, over the noise schedule of the pipeline's; None: the preset's or the
                pipeline's.
            graph: on CUDA, record the work of the U-Net and of the upsampler's network once and launch it as a whole in
                later steps (not run on a GPU yet).
            parallel: "guidance": of two processes of torch.distributed that make the same call, each computes one pass
                of every guided step; both return the views. None: this process computes both passes.
            guidance_scale: 1.0 to 20.0; at 1.0 no unconditional pass runs. None: the checkpoint's, usually 7.5.
            guidance_interval: noise levels (a, b); steps at a < σ ≤ b are guided, and the others are conditional alone,
                at half the cost. σ is √((1 - ᾱ)/ᾱ) of the training schedule, infinity included, whatever the solver.
                None: the preset's, without one all steps are guided.
            generator: an integer seed, or a torch.Generator, of which only the initial seed is used. Noise depends only
                on the seed, the index of the portrait and the index of the view. None: a random seed, stored in `run`.
                A list: one per portrait, which then gets the views that it gets alone with this generator.
            num_images_per_prompt: results per portrait, which differ in their noise; B counts each as a portrait.
            latents: initial noise [B*V,4,h,w]; None: drawn from the seed.
            renders: B*V images to add noise to and start from, such as renders of an avatar that is being fitted.
            strength: fraction of the noise schedule that is run on `renders`, over 0 and up to 1.
            eta: 0 is deterministic, 1 adds as much noise as DDPM; ignored by diffusers' schedulers without it. None:
                the solver's or the checkpoint's, usually 0.
            upsample: "auto" doubles the latents before decoding, with the checkpoint's upsampler if it has one, unless
                its U-Net has latents of the final size; "bilinear" doubles them by interpolation; "none" does not
                resize them.
            upsample_steps: steps of the checkpoint's upsampler, 1 to 1000; ignored where it does not run. None: the
                preset's, 10 without one.
            output_type: "pil", "np", "pt" or "latent".
            matte: remove the background of portraits without transparency, with rembg; the family's takes its place.
            crop: crop portraits to the head, of a checkpoint with a head_detector, where it is far from filling them.
            fit: without `normal_maps`, fit a head to each portrait, of a checkpoint with a head_fitter; False: the
                normal maps are the neutral head's.

        Returns:
            The run, for `denoise`.

        Raises:
            ImageError, CameraError, ValueError: as for `__call__`.
        """
        family = family_of(self.unet.config)
        plan = {"num_inference_steps": num_inference_steps, "scheduler": scheduler}
        plan |= {"guidance_interval": guidance_interval, "upsample_steps": upsample_steps}
        plan = with_preset(preset, plan)
        solver, steps = self._solver(plan["scheduler"]), plan["num_inference_steps"]
        guidance_scale = self.guidance_scale if guidance_scale is None else guidance_scale
        eta = max(family.eta, solver.default_eta) if eta is None else eta
        check_guidance_scale(guidance_scale)
        guided = needs_unconditional(guidance_scale)
        check_guidance_interval(plan["guidance_interval"])
        check_parallel(parallel, guided=guided, seeded=is_seeded(generator))
        check_eta(eta)
        self._check_graph(graph)
        check_choice("output_type", output_type, OUTPUT_TYPES)
        check_choice("upsample", upsample, UPSAMPLE)
        check_steps(plan["upsample_steps"], MAX_STEPS, name="upsample_steps")
        given = {"cameras": cameras, "normal_maps": normal_maps, "latents": latents, "renders": renders}
        cameras = resolve_cameras(cameras, num_views, family)
        is_batch, portraits = load_portraits(
            image,
            num_images_per_prompt,
            background=family.background,
            matte=matte,
            detector=self.head_detector if crop else None,
        )
        rows, seed = len(portraits) * len(cameras), resolve_seeds(generator, portraits=len(portraits))
        timesteps = set_timesteps(solver, steps, strength=strength, noised=renders is not None)
        size = latent_size(latents, rows=rows, channels=self.vae.config.latent_channels, config=self.unet.config)
        upsample, pixels = self._upsampling(upsample, size), size * self.vae.config.factor
        if renders is not None:
            renders = imaging.load_images(renders, count=rows, name="renders", background=family.background)
            renders = imaging.to_square_tensor(renders, pixels)
        halved = parallel is not None and self.device.type != "cpu"  # on CPUs, the other process takes the other half
        batch = {"portraits": len(portraits), "views": len(cameras), "passes": 1 + (guided and not halved)}
        self._check_memory(**batch, size=size, doubled=upsample != "none")
        fitted = self._fit(portraits[::num_images_per_prompt]) if fit and normal_maps is None else None
        normals = self._normal_maps(normal_maps, cameras, pixels, fitted)
        conditions = self._conditions(cameras, portraits, normals, pixels=pixels, guided=guided, seed=seed)
        if latents is None:
            latents = self._noise(seed, portraits=len(portraits), views=len(cameras), size=size)
        latents = latents.to(self.device, torch.float32)
        if renders is None:
            latents = latents * solver.init_noise_sigma
        else:
            latents = solver.add_noise(self.encode(renders), latents, timesteps[:1].expand(rows))
        sources = {name: "default" if value is None else "given" for name, value in given.items()}
        sources |= {} if fitted is None else {"normal_maps": "fitted"}
        return Run(
            latents=latents,
            timesteps=timesteps,
            conditions=conditions,
            cameras=cameras,
            guidance_scale=guidance_scale,
            solver=solver,
            graph=graph,
            parallel=parallel,
            seed=seed,
            portraits=portraits,
            guidance_interval=plan["guidance_interval"],
            eta=eta,
            upsample=upsample,
            upsample_steps=plan["upsample_steps"],
            output_type=output_type,
            is_batch=is_batch,
            num_images_per_prompt=num_images_per_prompt,
            normal_maps=None if normals is None else imaging.to_pil(normals),
            mesh=normal_maps if isinstance(normal_maps, Mesh) else None,
            heads=fitted,
            num_inference_steps=steps,
            settings={"strength": strength, "crop": crop, "matte": matte, **sources},
        )

    @torch.no_grad()
    def denoise(
        self,
        run: Run,
        *,
        callback_on_step_end: Callable[..., dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        progress_bar: bool = False,
    ) -> Tensor:
        """Run the denoising steps.

        Args:
            run: from `prepare`.
            callback_on_step_end, callback_on_step_end_tensor_inputs: as for `__call__`.
            progress_bar: show a progress bar.

        Returns:
            The denoised latents [B*V,4,h,w] float32, for `finish`.
        """
        callback, latents = StepCallback(callback_on_step_end, callback_on_step_end_tensor_inputs), run.latents
        settings = {"desc": f"{len(latents)} views", "total": len(run.timesteps), **self._progress_bar_config}
        settings["disable"] = settings.get("disable", False) or not progress_bar
        for _, stepped in tqdm(self._steps(run, callback), **settings):
            latents = stepped
        return latents

    @torch.no_grad()
    def steps(self, run: Run) -> Iterator[tuple[float, Tensor]]:
        """Yield (timestep, latents [B*V,4,h,w] float32) after each denoising step; latents may be changed in place.

        Args:
            run: from `prepare`.
        """
        yield from self._steps(run, StepCallback())

    def _steps(self, run: Run, callback: StepCallback) -> Iterator[tuple[float, Tensor]]:
        run = run.begun()
        solver, latents = run.solver, run.latents
        rows = {"portraits": run.num_portraits, "views": run.num_views}
        generator, predict = view_generators(run.seed, **rows), Predictor(self.unet, run)
        self._interrupt = False
        for step, timestep in enumerate(run.timesteps.tolist()):
            if self._interrupt:  # diffusers' way to end a run, from a callback or from another thread
                return
            output, noise = predict(latents, timestep), None
            if run.eta > 0:
                noise = self._noise(run.seed, **rows, size=latents.shape[-1], step=step + 1).to(latents.device)
            options = {"eta": run.eta, "noise": noise, "generator": generator}
            latents = callback.step(self, solver, step, output, timestep, latents, **options)
            yield timestep, latents

    @torch.no_grad()
    def finish(self, run: Run, latents: Tensor) -> MultiViewOutput | list[MultiViewOutput]:
        """Upsample and decode denoised latents.

        Args:
            run: result of `prepare`.
            latents: [B*V,4,h,w], result of `denoise`.

        Returns:
            The views of the portrait; a list with one entry per portrait if `prepare` got a list.

        Raises:
            ValueError: the decoded images are not finite.
        """
        outputs = [
            MultiViewOutput(
                self._pictures(part, run.output_type),
                run.cameras,
                self._settings(run, index),
                surface=run.surface_of(index),
                portrait=run.portraits[index],
                normal_maps=run.normal_maps_of(index),
            )
            for index, part in enumerate(self.upsample(run, latents).split(run.num_views))
        ]
        self.maybe_free_model_hooks()
        return outputs if run.is_batch else outputs[0]

    def _upsampling(self, upsample: str, size: int) -> str:
        """Return how latents of this side are doubled: "none" in place of "auto" where they have the final size."""
        if upsample == "auto" and self.upsampler is not None:
            self.upsampler.check_size(size, size)
        elif upsample == "auto" and not family_of(self.unet.config).doubles_latents:
            return "none"
        return upsample

    def _is_learned(self, upsample: str) -> bool:
        """The latents of a run with this `upsample` are doubled by the checkpoint's upsampler."""
        return upsample == "auto" and self.upsampler is not None

    def _settings(self, run: Run, index: int) -> dict[str, Any]:
        """Collect the parameters of one result for run.json: everything that its views depend on."""
        learned = self._is_learned(run.upsample)
        upsample = "upsampler" if learned else "none" if run.upsample == "none" else "bilinear"
        own = {"scheduler": dict(run.solver.config), "upsample": upsample}
        own["upsample_steps"] = run.upsample_steps if learned else None
        return {**self.describe(), **own, **run.describe(index)}

    def _noise(self, seed: int | tuple[int, ...], *, portraits: int, views: int, size: int, step: int = 0) -> Tensor:
        shape = (self.vae.config.latent_channels, size, size)
        return view_noise(seed, portraits=portraits, views=views, shape=shape, step=step)

    def upsample(self, run: Run, latents: Tensor) -> Tensor:
        """Double the size of latents [B*V,4,h,w] by the run's method; "none" returns them unchanged."""
        if run.upsample == "none":
            return latents
        if self.upsampler is None or not self._is_learned(run.upsample):
            return F.interpolate(latents, scale_factor=2.0, mode="bilinear", align_corners=False)
        shape = {"portraits": run.num_portraits, "views": run.num_views, "size": 2 * latents.shape[-1]}
        noise = self._noise(run.seed, **shape, step=NOISE_STEP)
        # Four of the built-in model's together take 0.63 of the time of one by one (2 cores of a Sapphire Rapids).
        numbers = latents[0, 0].numel() * self.upsampler.unet.config.block_out_channels[0]
        rows = rows_together(run.num_views, numbers, most=_UPSAMPLED)
        pairs = zip(latents.split(rows), noise.split(rows), strict=True)
        options = {"num_inference_steps": run.upsample_steps}
        options |= {"network": GraphedCall(self.upsampler.unet)} if run.graph else {}
        return torch.cat([self.upsampler(part, noise=drawn, **options) for part, drawn in pairs])

    def _pictures(self, latents: Tensor, output_type: str) -> list[PIL.Image.Image] | np.ndarray | Tensor:
        if output_type == "latent":
            return latents
        pictures = self.decode(latents)
        if not pictures.isfinite().all():
            hint = "" if self.dtype == torch.float32 else f": {self.dtype} may be too narrow for this checkpoint"
            raise ValueError(f"the decoded pictures have NaN or infinite values{hint}")
        if output_type == "pt":
            return pictures.clamp(0, 1)
        return imaging.to_pil(pictures) if output_type == "pil" else imaging.to_numpy(pictures)
