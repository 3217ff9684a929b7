"""Train the autoencoder on renders and normal maps; check in vae.png that held-out shirts have the right colours."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from data import draw_heads, face_weights, generator, view_cameras
from export import export_vae
from generated import GeneratedLatents
from initial import carry_over, start_linear
from PIL import Image
from torch import Tensor, nn
from training import Trainer, arguments, mixed_precision, rung_of

from gafext import AutoencoderKL, heads
from gafext.cameras import DEFAULT_FOV, Cameras
from gafext.evaluation.measures import face_psnr, psnr, sharpness

KL_WEIGHT = 3e-5
COLOUR_WEIGHT = 1.0
CONTRAST_WEIGHT = 4.0
SQUARE_WEIGHT = 4.0  # for parts of the face whose places are uncertain, of which L1 alone takes the median
NOISE = 0.1  # added to encoded latents for the decoder alone, as generated ones have errors; their variance is 1
NORMAL_MAPS = 1 / 2  # fraction of the images that are normal maps
TURNS = ("whole", "detail", "whole", "large")
"""Images of the steps, in turn: at their size; a window of the image at twice its size, which has as many pixels; or a
quarter as many images at twice their size, the size of upsampled images."""
GENERATED = ("generated", "whole", "generated", "large")
"""The same for a decoder that goes on beside a whole model: large images from the latents that it generates."""


def pictures(turn: str, step: int, seed: int, size: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Render the images and normal maps of a step, and weights of their pixels.

    Returns:
        [count,3,size,size] in [-1,1], or a quarter as many large ones; [count,1,size,size], 1 or more.
    """
    random = generator(seed, step)
    focal, centre = Cameras(torch.eye(4)[None], DEFAULT_FOV).focal(size), torch.full((2,), size / 2)
    if turn == "large":
        size, count, focal, centre = 2 * size, count // 4, 2 * focal, 2 * centre
    elif turn == "detail":
        focal, centre = 2 * focal, size * (0.25 + torch.rand(2, generator=random) / 2)
    lens = torch.tensor([[focal, 0, centre[0]], [0, focal, centre[1]], [0, 0, 1]])
    normals = round(NORMAL_MAPS * count)
    images = count - normals
    who, w2c = draw_heads(images, random, device), view_cameras(images, 1, random)
    drawn = heads.render(who, w2c, size, intrinsics=lens)
    weights = face_weights(drawn.face[:, 0])
    return torch.cat([drawn.rgb, drawn.normals[:normals]])[:, 0] * 2 - 1, torch.cat([weights, weights[:normals]])


def contrast(pictures: Tensor, window: int) -> Tensor:
    """Compute the root of the mean squared gradient in windows: [N,3,S,S] -> [N,1,S/window,S/window]."""
    squares = F.pad(pictures.diff(dim=-1), (0, 1)).square() + F.pad(pictures.diff(dim=-2), (0, 0, 0, 1)).square()
    return (F.avg_pool2d(squares.sum(1, keepdim=True), window) + 1e-4).sqrt()


def distance(made: Tensor, wanted: Tensor, weights: Tensor) -> Tensor:
    """Compute the loss: weighted pixels (L1, squares), their gradients, 4 x 4 averages, the averages' colour, contrast.

    The medians that L1 leads to are blurred where a detail cannot be told: an autoencoder of 36 dB kept half of the
    gradients' energy. So contrast has a term of its own, in small windows, and in large ones, where the median does not
    lack what is in few small ones, as strands are (.73 of the energy of generated views without, .83 with it). Before a
    white background, colour is a small part of the variance; without a separate term it is learned last.
    """
    error = (made - wanted) * weights
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    coarse = F.avg_pool2d(error, 4)
    red, green, blue = coarse.unbind(1)
    colour = (red - green).abs().mean() + (blue - (red + green) / 2).abs().mean()
    fine = (F.avg_pool2d(weights, 4) * (contrast(made, 4) - contrast(wanted, 4)).abs()).mean()
    dull = fine + (contrast(made, 32) - contrast(wanted, 32)).abs().mean()
    squares = (weights * (made - wanted).square()).mean()
    plain = error.abs().mean() + SQUARE_WEIGHT * squares + 0.5 * edges + coarse.abs().mean()
    return plain + COLOUR_WEIGHT * colour + CONTRAST_WEIGHT * dull


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--decoder-only", action="store_true", help="go on with the decoder of <out>/model alone")
    args = parser.parse_args(argv)
    rung, device = rung_of(args), torch.device(args.device)
    torch.manual_seed(args.seed)
    if args.decoder_only:
        vae = AutoencoderKL.from_pretrained(args.out / "model" / "vae").train()
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    else:
        vae = AutoencoderKL(rung.vae)
        start_linear(vae, zero=(".conv2.", ".to_out."))
        if args.start:
            carry_over(vae, AutoencoderKL.from_pretrained(args.start / "vae").state_dict())
    vae = vae.to(device, memory_format=torch.channels_last)
    whole = args.decoder_only and all((args.out / "model" / part).is_dir() for part in ("unet", "upsampler"))
    turns = GENERATED if whole else TURNS
    latents = vae.config  # with the moments of the latents that U-Net and upsampler are trained on, if decoder_only

    def loss(step: int) -> Tensor:
        turn = turns[step % len(turns)]
        if turn == "generated":
            mean, wanted, weights = generated.draw(step, rung.vae_batch // 4)
            kl = spread = 0.0
        else:
            wanted, weights = pictures(turn, step, args.seed, rung.image_size, rung.vae_batch, device)
        wanted = wanted.contiguous(memory_format=torch.channels_last)
        with mixed_precision(device):
            if turn != "generated":
                mean, logvar = (moment.float() for moment in vae.encode(wanted))
                kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
                spread = NOISE / latents.scaling_factor if args.decoder_only else (logvar / 2).exp()
            noise = torch.randn(mean.shape, generator=generator(args.seed, step, device), device=device)
            made = vae.decode(mean + spread * noise).float()
        return distance(made, wanted, weights) + KL_WEIGHT * kl

    random = generator(10**6, 0)
    held_out = heads.make_heads(heads.TEST_IDENTITIES[:32], device)
    cameras = view_cameras(len(held_out), 1, random)
    truth = {size: heads.render(held_out, cameras, size) for size in (rung.image_size, 2 * rung.image_size)}

    @torch.no_grad()
    def measure(averaged: dict[str, nn.Module], step: int) -> dict[str, float]:
        numbers, rows, moments = {}, [], []
        for size, renders in truth.items():
            for kind, wanted in (("images", renders.rgb[:, 0]), ("normals", renders.normals[:, 0])):
                mean = torch.cat([averaged["vae"].encode(part * 2 - 1)[0] for part in wanted.split(8)])
                made = torch.cat([averaged["vae"].decode(part) for part in mean.split(8)]) / 2 + 0.5
                numbers[f"{kind}_{size}"] = psnr(made, wanted).mean().item()
                numbers[f"{kind}_face_{size}"] = face_psnr(made, wanted, renders.face[:, 0]).nanmean().item()
                numbers[f"{kind}_sharpness_{size}"] = sharpness(made, wanted, renders.alpha[:, 0])
                if size == rung.image_size:
                    moments.append((mean.mean().item(), mean.std().item()))
                    rows += [wanted[:16], made[:16].clamp(0, 1)]
        sheet = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
        Image.fromarray((sheet.permute(1, 2, 0).cpu() * 255).byte().numpy()).save(args.out / "vae.png")
        shift, spread = moments[0]  # moments of the images' latents, which are what the U-Net generates
        if args.decoder_only:
            export_vae(args.out, averaged["vae"], scale=latents.scaling_factor, shift=latents.shift_factor)
        else:
            export_vae(args.out, averaged["vae"], scale=1 / spread, shift=shift)
        return numbers | {"latent_mean": shift, "latent_std": spread}

    stage, decoder = "decoder" if args.decoder_only else "vae", args.out / "decoder.pt"
    trainer = Trainer(stage, args, {"vae": vae}, rate=rung.vae_rate, loss=loss, measure=measure)
    if not (args.decoder_only or trainer.done) and decoder.exists():
        raise SystemExit(f"{decoder}: the decoder was trained on alone, which this would undo; remove it to go on")
    if whole and not trainer.done:
        generated = GeneratedLatents(args.out / "model", device, args.seed)
    trainer.run()


if __name__ == "__main__":
    main()
