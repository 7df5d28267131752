"""Pictures of what the generators do: 19 corruptions at 5 severities, and SimCLR's views.

    python tools/benchmarks/contact_sheet.py corruptions --image photo.jpg --output docs/images/corruptions-photo.jpg
    python tools/benchmarks/contact_sheet.py corruptions --cifar ROOT --output docs/images/corruptions-cifar.png
    python tools/benchmarks/contact_sheet.py views --image photo.jpg --output docs/images/views-photo.jpg

ROOT is a folder with CIFAR-10's python batches. Photographs are brought to a short side of 256 pixels and cropped to
224, and corrupted with the parameters for ImageNet; CIFAR images are shown at three times their size.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ttalight.data import CIFARDataModule
from ttalight.data.corruptions import COMMON, EXTRA, corrupt
from ttalight.transforms import SimCLRViews

LABEL = 150  # pixels for a row's name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["corruptions", "views"])
    parser.add_argument("--image", type=Path, help="a photograph")
    parser.add_argument("--cifar", type=str, help="a folder with CIFAR-10")
    parser.add_argument("--index", type=int, default=3, help="which test image of CIFAR-10")
    parser.add_argument("--tile", type=int, default=112, help="side of a shown photograph in pixels")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    if (options.image is None) == (options.cifar is None):
        parser.error("give --image or --cifar")
    if options.image is not None:
        image, table, tile, filtering = read_photograph(options.image), "imagenet", options.tile, Image.Resampling.BOX
    else:
        images = CIFARDataModule(root=options.cifar).load("test").images
        image, table, tile, filtering = images[options.index :][:1], "cifar", 96, Image.Resampling.NEAREST
    rows = corruption_rows(image, table) if options.what == "corruptions" else view_rows(image)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    draw_sheet(rows, tile, filtering).save(options.output, quality=85)


def read_photograph(path: Path) -> Tensor:
    """Return the photograph's centre as uint8, (1, 3, 224, 224)."""
    picture = Image.open(path).convert("RGB")
    scale = 256 / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    left, top = (picture.width - 224) // 2, (picture.height - 224) // 2
    pixels = np.array(picture.crop((left, top, left + 224, top + 224)))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()


def corruption_rows(image: Tensor, table: str) -> dict[str, list[Tensor]]:
    """Return for every corruption the clean image and its five severities."""
    return {
        name: [image[0], *(corrupt(image, name, severity, table=table)[0] for severity in range(1, 6))]
        for name in (*COMMON, *EXTRA)
    }


def view_rows(image: Tensor, count: int = 6) -> dict[str, list[Tensor]]:
    """Return rows of views, with and without the colour changes."""
    clean = image.float() / 255

    def views(**options: float) -> list[Tensor]:
        drawn = SimCLRViews(**options)(clean, torch.Generator().manual_seed(0), views=count)
        return list((drawn * 255).round().to(torch.uint8))

    return {
        "SimCLR": views(),
        "crop and flip": views(jitter_probability=0.0, grayscale=0.0),
        "with blur": views(blur=1.0),
    }


def draw_sheet(rows: dict[str, list[Tensor]], tile: int, filtering: Image.Resampling) -> Image.Image:
    columns = max(map(len, rows.values()))
    sheet = Image.new("RGB", (LABEL + columns * tile, len(rows) * tile), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for row, (name, images) in enumerate(rows.items()):
        pen.text((6, row * tile + tile // 2 - 8), name, fill="black", font=font)
        for column, image in enumerate(images):
            picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((tile, tile), filtering)
            sheet.paste(picture, (LABEL + column * tile, row * tile))
    return sheet


if __name__ == "__main__":
    main()
