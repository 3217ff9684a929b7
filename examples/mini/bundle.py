"""Copy a trained model into the package, with its model card and the bundled portrait."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

from gafext.atomic import Replaceable, whole_folder
from gafext.evaluation import Scores, as_portrait, subjects, table

PORTRAIT_IDENTITY = 34  # index among the held-out identities
STAGES = ("vae", "head_fitter", "image_encoder", "unet", "upsampler", "decoder")
ASSETS = Path(__file__).parents[2] / "gafext" / "assets"
CARD = """\
# The built-in model of gafext

Trained from {origin} by `examples/mini` (rung "{rung}") on {hardware}: {training}.
Autoencoder, image encoder, multi-view U-Net, latent upsampler, detector and fitter of heads, {parameters:.1f} M
parameters in float16; pictures of {size} pixels, {large} upsampled.

**Data.** Procedural heads (`gafext.heads`, identities 0 to 999,999), drawn with their normal maps by a ray caster. No
photographs, no people, no other model's output.

**Numbers.** {settings}

```
{table}
```

**Limits.** It knows nothing but these drawn heads: of a photograph it makes a cartoon. Portraits from within 30 degrees
of the front, cameras at a distance of 3.7 to 4.4 with a field of view of 30 degrees, elevations of -15 to 25 degrees.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("out", type=Path, help="output folder of train_all.sh, with eval.json of `gafext eval`")
    add("--rung", required=True)
    add("--hardware", required=True, metavar="TEXT")
    add("--origin", default="nothing", metavar="TEXT", help="of the weights that --start carried over")
    args = parser.parse_args()
    report = json.loads((args.out / "eval.json").read_text())
    with whole_folder(ASSETS / "model", replaceable=Replaceable(re.compile(".*"))) as new:
        shutil.copytree(args.out / "model", new, dirs_exist_ok=True)
    as_portrait(subjects(1, 512, first=PORTRAIT_IDENTITY)[0].portrait).save(ASSETS / "portrait.png")

    logs = {stage: args.out / f"{stage}.json" for stage in STAGES}
    curves = {stage: json.loads(log.read_text()) for stage, log in logs.items() if log.is_file()}
    (Path(__file__).parent / "curves.json").write_text(json.dumps(curves, indent=0) + "\n")
    stages = [f"{name} {c[-1]['step']} steps, {c[-1]['seconds'] / 60:.0f} min" for name, c in curves.items()]
    files = list((ASSETS / "model").rglob("*.safetensors"))
    unet, vae = (json.loads((ASSETS / "model" / part / "config.json").read_text()) for part in ("unet", "vae"))
    size = unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)
    settings = report["settings"]
    card = CARD.format(
        rung=args.rung,
        hardware=args.hardware,
        origin=args.origin,
        training="; ".join(stages),
        parameters=sum(file.stat().st_size for file in files) / 2e6,
        size=size,
        large=2 * size,
        settings=f"`gafext eval` on {settings['heads']} held-out heads, {settings['views']} views, "
        f"{settings['steps']} steps, upsample {settings['upsample']}:",
        table=table(Scores(**line) for line in report["lines"]),
    )
    (ASSETS / "model" / "README.md").write_text(card)


if __name__ == "__main__":
    main()
