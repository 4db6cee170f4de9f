"""What an autoencoder keeps of pictures: how near its pictures come, and whether the same things are read in them.

Peak signal-to-noise ratio counts pixels, MS-SSIM (Wang et al. 2003) contrast and structure at several scales; neither
knows what a picture shows. On scenes the exact recogniser does: a picture is kept when every object is read from its
reconstruction as it was, in its shape, colour, size and place, and nothing else is. No model in the latents can draw
better than that.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.catalogue import build
from sfumato.codecs import Codec
from sfumato.data.picture import Image
from sfumato.data.scenes import Thing, recognise
from sfumato.data.sheet import sheet
from sfumato.io.pretrained import codec_from, fill_codec
from sfumato.metrics.flow import Examples
from sfumato.metrics.intervals import told_mean, told_share
from sfumato.metrics.scenes import HIT, MISS, stands
from sfumato.objectives.distances import StructuralSimilarity

SHOWN = 16  # pictures of a sheet, and as many reconstructions


def autoencoder(path: str | Path, device: torch.device) -> Codec:
    """The autoencoder of a run, a model in latents, a folder of diffusers or a file, on a device.

    CheckpointError for what has none.
    """
    slot, weights = codec_from({"kind": "latents", "weights": str(path)})
    codec = build(slot, "Codec")
    fill_codec(codec, weights)
    return codec.to(device).eval()  # type: ignore[no-any-return]


def judge_reconstruction(
    codec: Codec,
    found: Examples,
    device: torch.device,
    *,
    batch: int = 100,
    folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Pictures through the mean of their latents and back, as plain data: `psnr` in dB, `ms_ssim`, and on scenes
    `kept`, each with its 95% interval.

    folder: where a sheet of pictures above their reconstructions is written, framed by whether they are kept.
    """
    started, n = time.perf_counter(), len(found.images)
    drawn, errors, alike = list[Image](), list[Tensor](), list[Tensor]()
    for start in range(0, n, batch):
        pixels = torch.from_numpy(found.images[start : start + batch]).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.inference_mode():
            back = codec.decode(codec.encode(pixels.to(device))).float().clamp(-1, 1).cpu()
        errors.append((back - pixels).flatten(1).square().mean(1))
        alike.append(1 - StructuralSimilarity()(back, pixels))
        drawn += list(((back + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy())
        if progress is not None:
            progress(min(start + batch, n), n)
    psnr = 10 * torch.log10(4 / torch.cat(errors).clamp(min=1e-10))
    scores = {"psnr": told_mean(psnr.tolist()), "ms_ssim": told_mean(torch.cat(alike).tolist())}
    kept = None
    if found.kind == "scenes":
        size = found.images.shape[1:3]
        pairs = zip(found.images, drawn, strict=True)
        kept = [same(recognise(one), recognise(other), size) for one, other in pairs]
        scores["kept"] = told_share(sum(kept), n)
    if folder is not None:
        _shown(list(found.images), drawn, kept, psnr).save(folder / "reconstruction.png")
    facts = {"images": n, "held_out": found.held_out, "seconds": round(time.perf_counter() - started, 1)}
    return {"suite": "reconstruction", **scores, **facts}


def same(things: Sequence[Thing], others: Sequence[Thing], size: tuple[int, int]) -> bool:
    """Whether two pictures of (height, width) hold the same things, each at its place."""
    left = list(others)
    for thing in things:
        alike = [one for one in left if (thing.colour, thing.size) == (one.colour, one.size)]
        found = next((one for one in alike if stands(thing, one, size)), None)
        if found is None:
            return False
        left.remove(found)
    return not left


def _shown(images: Sequence[Image], drawn: Sequence[Image], kept: Sequence[bool] | None, psnr: Tensor) -> Any:
    """Rows of eight pictures, each above a row of what became of them."""
    shown, said, frames = list[Image](), list[str](), list[tuple[int, int, int] | None]()
    for start in range(0, min(SHOWN, len(images)), 8):
        part = range(start, min(start + 8, SHOWN, len(images)))
        shown += [images[i] for i in part] + [drawn[i] for i in part]
        said += ["" for _ in part] + [f"{psnr[i]:.1f} dB" for i in part]
        frames += [None for _ in part]
        frames += [None if kept is None else HIT if kept[i] else MISS for i in part]
    return sheet(shown, said, columns=min(8, len(images)), frames=frames)
