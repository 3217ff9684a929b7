"""Measure the quality of the built-in model's views against time, for presets, samplers, steps and guidance intervals.

    python benchmarks/presets.py [--heads 7] [--first 0] [--json FILE]
    python benchmarks/plot_presets.py FILE.json FIGURE.svg

Every head is one round, in which all options take their turn in one process. Per option: PSNR, SSIM and consistency
against the truth, the PSNR against the views of "quality" from the same noise, and the seconds of each round:
`seconds` of the denoising steps alone, `seconds_in_all` with encoding, upsampling and decoding.
"""

import argparse
import json
import math
import statistics
import time
import warnings
from dataclasses import asdict

from race import json_file, positive, write

import gafext
from gafext.bench.environment import environment
from gafext.evaluation import Evaluation, Scores
from gafext.evaluation.measures import psnr

DPM, INTERVAL = {"scheduler": "dpm++"}, (0.28, 5.42)
OPTIONS = {
    "quality": {"preset": "quality"},
    "balanced": {"preset": "balanced"},
    "fast": {"preset": "fast"},
    "fast, 10 steps of the upsampler": {"preset": "fast", "upsample_steps": 10},
    "DDIM, 50 steps, interval": {"num_inference_steps": 50, "guidance_interval": INTERVAL},
    "DDIM, 25 steps": {"num_inference_steps": 25},
    "DDIM, 15 steps": {"num_inference_steps": 15},
    "2M, 15 steps": {**DPM, "num_inference_steps": 15},
    "2M, 15 steps, interval 0.28 to inf": {**DPM, "num_inference_steps": 15, "guidance_interval": (0.28, math.inf)},
    "2M, 15 steps, interval 1 to 5.42": {**DPM, "num_inference_steps": 15, "guidance_interval": (1.0, 5.42)},
    "2M, 15 steps, unguided": {**DPM, "num_inference_steps": 15, "guidance_scale": 1.0},
    "2M, 10 steps, interval": {**DPM, "num_inference_steps": 10, "guidance_interval": INTERVAL},
    "Euler, 25 steps": {"scheduler": "euler", "num_inference_steps": 25},
    "Euler ancestral, 25 steps": {"scheduler": "euler-a", "num_inference_steps": 25},
    "LCM, 8 steps": {"scheduler": "lcm", "num_inference_steps": 8},
}


class Timed(gafext.MultiViewDiffusionPipeline):
    """Pipeline that keeps the seconds of the last denoising loop."""

    seconds = 0.0

    def denoise(self, *args, **options):
        start = time.perf_counter()
        latents = super().denoise(*args, **options)
        self.seconds = time.perf_counter() - start
        return latents


def measure(heads: int, *, first: int = 0, options: dict[str, dict] = OPTIONS) -> list[dict]:
    """Generate the views of held-out heads with every option, and score and time them against the first."""
    names = list(options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the CartoonWarning is not about drawn heads
        pipe = Timed(**gafext.MultiViewDiffusionPipeline.from_pretrained(device="cpu").components)
    rounds = [Evaluation(pipe, 1, first=first + head, num_inference_steps=None) for head in range(heads)]
    subjects = [evaluation.subjects[0] for evaluation in rounds]
    rounds[0].generate(num_inference_steps=2)  # warms up
    made, loops, wholes = ({name: [] for name in names} for _ in range(3))
    for number, evaluation in enumerate(rounds):
        for name in names:
            start = time.perf_counter()
            made[name] += evaluation.generate(**options[name])
            wholes[name].append(time.perf_counter() - start)
            loops[name].append(pipe.seconds)
        print(f"head {number + 1} of {heads}", flush=True)
    found = []
    for name in names:
        pairs = zip(made[name], made[names[0]], strict=True)
        same = [psnr(views, reference.clamp(0, 1)).mean().item() for views, reference in pairs]
        row = {**asdict(Scores.of(name, subjects, made[name])), "options": options[name]}
        row |= {"psnr_to_quality": statistics.mean(same), "seconds": loops[name], "seconds_in_all": wholes[name]}
        for key, seconds in (("times_as_fast", loops), ("times_as_fast_in_all", wholes)):
            ratios = [a / b for a, b in zip(seconds[names[0]], seconds[name], strict=True)]
            row[key] = statistics.median(ratios)
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=positive, default=7, metavar="N")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="held-out heads to skip")
    parser.add_argument("--json", type=json_file, metavar="FILE")
    args = parser.parse_args()
    rows = measure(args.heads, first=args.first)
    arguments = {"heads": args.heads, "first": args.first}
    write({"environment": environment("cpu"), "arguments": arguments, "options": json_clean(rows)}, args.json)
    for row in rows:
        quality = f"{row['psnr']:.2f} dB  {row['ssim']:.4f}  consistency {row['consistency']:.2f} dB"
        times = f"{row['times_as_fast']:.2f} x, in all {row['times_as_fast_in_all']:.2f} x"
        print(f"{row['name']:36} {quality}  to quality {row['psnr_to_quality']:.1f} dB  {times}")


def json_clean(rows: list[dict]) -> list[dict]:
    """Return rows with infinity as a string, which JSON does not have."""
    return json.loads(json.dumps(rows).replace("Infinity", '"inf"'))


if __name__ == "__main__":
    main()
