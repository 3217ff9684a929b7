"""Web page of `gafext demo`, made with Gradio: upload a portrait, watch the views being denoised, download them."""

from __future__ import annotations

import html
import importlib.util
import os
import shutil
import signal
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gafext.assets import PORTRAIT
from gafext.images import read_image, to_pil
from gafext.noise import resolve_seed

_MAX_VIEWS, _MAX_STEPS, _MAX_WAITING = 16, 200, 8
_PREVIEWS = 10  # per run: decoding after every step would take about as long as the steps of a small U-Net
_KEPT = 3600  # seconds for which uploads and results stay on the server


class Frame(NamedTuple):
    """State of a run after a step.

    Attributes:
        step, steps: steps taken, and of the whole run.
        images: preview, V PIL images; of the last frame the paths of the views; None: no preview after this step.
        archive: zip file of the output folder, of the last frame; it is deleted when the next frame is asked for.
    """

    step: int
    steps: int
    images: list[Any] | None = None
    archive: Path | None = None


def require_gradio() -> None:
    """Raise a ValueError unless gradio is installed; it is imported later, once `serve` has set its folder."""
    if importlib.util.find_spec("gradio") is None:
        raise ValueError('demo: expected gradio, which is not installed: pip install "gafext[demo]"')


def frames(
    pipe: Any, portrait: str | Path, *, num_views: int, num_inference_steps: int, guidance_scale: float, seed: int
) -> Iterator[Frame]:
    """Generate views as `gafext generate` does; a step is taken when its frame is asked for.

    Args:
        pipe: a `gafext.MultiViewDiffusionPipeline`.
        portrait: path of an image.
        num_views, num_inference_steps, guidance_scale: those of the pipeline.
        seed: seed of all noise, 0 or more.

    Returns:
        A frame after each step, and a last one with the views.

    Raises:
        ImageError: the portrait cannot be read.
        ValueError: an argument is out of range.
    """
    options = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, "generator": seed}
    run = pipe.prepare(read_image(portrait), num_views=num_views, **options)
    steps, latents = len(run.timesteps), run.latents
    for step, (_, stepped) in enumerate(pipe.steps(run), start=1):
        latents = stepped
        shown = step % max(1, steps // _PREVIEWS) == 0
        yield Frame(step, steps, to_pil(pipe.decode(latents)) if shown else None)
    output = pipe.finish(run, latents)
    with tempfile.TemporaryDirectory(prefix="gafext-demo-") as temporary:
        views = output.save(Path(temporary) / "views")
        archive = shutil.make_archive(str(views), "zip", root_dir=views.parent, base_dir="views")
        yield Frame(steps, steps, sorted(views.glob("view_*.png")), Path(archive))


def page(pipelines: Mapping[str, Any]) -> Any:
    """Build the page.

    Args:
        pipelines: the pipelines to choose from, by the names to show.

    Returns:
        A `gradio.Blocks`, with a queue that runs one call at a time.
    """
    gradio, names = importlib.import_module("gradio"), list(pipelines)
    running = threading.Lock()  # Gradio starts the next call while a cancelled one is still within a step

    def show(portrait: str | None) -> Any:
        with _messages(gradio, portrait):
            picture = read_image(portrait or PORTRAIT)
        picture.thumbnail((512, 512))
        return picture

    def default_guidance(model: str) -> float:
        return pipelines[model].guidance_scale

    def generate(portrait, model, num_views, steps, guidance_scale, seed, random) -> Iterator[tuple]:
        seed, nothing = resolve_seed(None if random else seed), gradio.skip()
        yield None, _bar(0, steps), gradio.DownloadButton(interactive=False), seed
        options = {"num_views": num_views, "num_inference_steps": steps, "guidance_scale": guidance_scale}
        run = frames(pipelines[model], portrait or PORTRAIT, **options, seed=seed)
        with running:
            while True:
                with _messages(gradio, portrait):
                    frame = next(run, None)
                if frame is None:
                    return
                saved = gradio.DownloadButton(value=frame.archive, interactive=True) if frame.archive else nothing
                yield frame.images or nothing, _bar(frame.step, frame.steps), saved, nothing

    with gradio.Blocks(title="gafext", analytics_enabled=False, delete_cache=(60, _KEPT)) as blocks:
        gradio.Markdown("# gafext\nOne portrait in, several consistent views of the same head out.")
        with gradio.Row():
            with gradio.Column(scale=1):
                portrait = gradio.File(label="Portrait", height=140)
                preview = gradio.Image(str(PORTRAIT), show_label=False, interactive=False, height=180, buttons=[])
                model = gradio.Dropdown(names, value=names[0], label="Model")
                views = gradio.Slider(1, _MAX_VIEWS, value=4, step=1, precision=0, label="Views")
                steps = gradio.Slider(1, _MAX_STEPS, value=50, step=1, precision=0, label="Steps")
                guidance = gradio.Slider(1, 20, value=default_guidance(names[0]), step=0.1, label="Guidance")
                seed = gradio.Number(0, precision=0, minimum=0, label="Seed")
                random = gradio.Checkbox(label="Random seed")
                with gradio.Row():  # on this side messages do not cover them
                    start = gradio.Button("Generate", variant="primary", min_width=80)
                    stop = gradio.Button("Stop", min_width=80)
                download = gradio.DownloadButton("Download .zip", interactive=False)
            with gradio.Column(scale=3):
                bar = gradio.HTML()
                gallery = gradio.Gallery(show_label=False, format="jpeg", columns=4, buttons=["fullscreen"])
        portrait.change(show, portrait, preview, api_visibility="private")
        model.change(default_guidance, model, guidance, api_visibility="private")
        call = start.click(
            generate,
            [portrait, model, views, steps, guidance, seed, random],
            [gallery, bar, download, seed],
            show_progress_on=gallery,
            trigger_mode="multiple",  # with "once" Gradio drops a click while a stopped run is still within a step
            api_visibility="private",
        )
        stop.click(None, cancels=[call])
    return blocks.queue(max_size=_MAX_WAITING, default_concurrency_limit=1)


def serve(pipelines: Mapping[str, Any], *, host: str, port: int, max_upload: float) -> None:
    """Serve the page until the process is interrupted or terminated; nothing stays on the disk.

    Args:
        pipelines: those of `page`.
        host, port: address to listen on.
        max_upload: largest file that may be uploaded, in MiB.

    Raises:
        OSError: the address cannot be listened on.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="gafext-demo-") as temporary:
        os.environ["GRADIO_TEMP_DIR"] = temporary
        blocks = page(pipelines)
        options = {"share": False, "run_history": False, "enable_monitoring": False, "mcp_server": False}
        options |= {"ssr_mode": False, "inline": False, "prevent_thread_lock": True, "quiet": True, "footer_links": []}
        try:
            try:
                blocks.launch(server_name=host, server_port=port, max_file_size=int(max_upload * 2**20), **options)
            except OSError:
                raise OSError(f"{host}:{port}: cannot be listened on; pass another --host or --port") from None
            print(f"gafext demo: {blocks.local_url} (Ctrl+C ends it)", flush=True)
            threading.Event().wait()
        except KeyboardInterrupt:
            pass
        finally:
            blocks.close(verbose=False)


_RECORDING = threading.Lock()  # what catch_warnings changes is the process's, and uploads are shown beside a run


@contextmanager
def _messages(gradio: Any, portrait: str | None) -> Iterator[None]:
    """Show gafext's errors and warnings on the page, without the folder of the upload; bugs are logged alone."""
    folder = f"{Path(portrait).parent}{os.sep}" if portrait else ""

    def text(message: object) -> str:
        return html.escape(str(message).replace(folder, "") or type(message).__name__, quote=False)

    try:
        with _RECORDING, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            yield
    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        raise gradio.Error(text(error), print_exception=False) from None
    for warning in caught:
        gradio.Warning(text(warning.message))


def _bar(step: int, steps: int) -> str:
    return f'<progress value="{step}" max="{steps}" style="width: 100%"></progress> Step {step} of {steps}'
