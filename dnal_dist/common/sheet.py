"""A contact sheet: images in rows, their captions below them."""

from collections.abc import Iterable, Sequence

from PIL import Image, ImageDraw, ImageFont

COLUMNS, MARGIN, LINE = 8, 4, 13


def sheet(images: Iterable[Image.Image], captions: Sequence[Sequence[tuple[str, str]]], side: int) -> Image.Image:
    """captions: of each image, lines of text and colour, as many for each. side: of a tile, in pixels; images are fitted in."""
    room, caption, font = side - 2 * MARGIN, 7 + LINE * len(captions[0]), ImageFont.load_default(11)
    made = Image.new("RGB", (COLUMNS * side, -(-len(captions) // COLUMNS) * (side + caption)), "white")
    draw = ImageDraw.Draw(made)
    for number, (image, lines) in enumerate(zip(images, captions, strict=True)):
        left, top = number % COLUMNS * side, number // COLUMNS * (side + caption)
        tile = _fitting(image, room)
        made.paste(tile, (left + (side - tile.width) // 2, top + (side - tile.height) // 2))
        for line, (text, colour) in enumerate(lines):
            draw.text((left + MARGIN, top + side + 3 + LINE * line), _cut(text, font, room), colour, font=font)
    return made


def _fitting(image: Image.Image, room: int) -> Image.Image:
    scale = room / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    # An image of 8 pixels is clearer as squares.
    return image.resize(size, Image.Resampling.NEAREST if scale > 4 else Image.Resampling.LANCZOS)


def _cut(text: str, font: ImageFont.FreeTypeFont, room: int) -> str:
    # The built-in font has Latin letters only.
    text = text.encode("latin-1", "replace").decode("latin-1")
    while len(text) > 1 and font.getlength(text) > room:
        text = text[:-1]
    return text
