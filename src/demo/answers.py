"""What two networks answer to photos, as a table and as a picture: the dense network's likeliest classes beside the
compressed one's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

Ranked = Sequence[tuple[str, float]]
"""Classes with their probabilities, falling."""

PHOTO, ROW, GAP, MARGIN = 150, 30, 14, 12
"""Pixels: side of a photo, height of a class (the photo's is that of five), between columns, and around all."""
PANEL, BAR = 310, 250
"""Pixels: width of a network's column, and of a bar for a probability of 1."""
SHARED, OWN, TEXT, FAINT = "#2b6cb0", "#b8c2cc", "#1a202c", "#718096"
"""Colours of the bars of classes that both networks name, of those that only one does, and of texts."""


@dataclass(frozen=True)
class Answers:
    """What the networks answer to one photo.

    Attributes:
        title: what the photo shows.
        calibrated: whether the network was calibrated with crops of it.
        dense, compressed: the likeliest classes, of equal count.
    """

    title: str
    calibrated: bool
    dense: Ranked
    compressed: Ranked

    @property
    def agree(self) -> bool:
        """Whether the first classes are the same."""
        return self.dense[0][0] == self.compressed[0][0]

    @property
    def shared(self) -> int:
        """How many classes both name."""
        return len({name for name, _ in self.dense} & {name for name, _ in self.compressed})


def table(answers: Sequence[Answers], dense: str, compressed: str) -> str:
    """The classes as text, a block for every photo; photos of calibration have a star.

    Args:
        answers: to each photo.
        dense, compressed: titles of the columns.
    """
    names = [name for one in answers for name, _ in (*one.dense, *one.compressed)]
    first = max(len("photo"), *(len(_starred(one)) for one in answers))
    wide = max([len(name) for name in names] + [len(dense) - 9, len(compressed) - 9])
    lines = [f"{'photo':<{first}}  {dense:<{wide + 9}}  {compressed}"]
    lines.append("-" * (first + 2 * (wide + 9) + 4))
    for one in answers:
        title = _starred(one)
        for left, right in zip(one.dense, one.compressed, strict=True):
            columns = (f"{name:<{wide}}  {100 * share:5.1f} %" for name, share in (left, right))
            lines.append(f"{title:<{first}}  {'  '.join(columns)}")
            title = ""
        lines.append("")
    return "\n".join(lines[:-1])


def _starred(one: Answers) -> str:
    return f"{one.title}*" if one.calibrated else one.title


def sheet(shown: Sequence[tuple[Image.Image, Answers]], dense: str, compressed: str) -> Image.Image:
    """A picture with a row for every photo: it, and the classes of both networks with bars as long as they are
    likely; classes that both networks name are in colour.

    Args:
        shown: what the networks saw of each photo, and their answers.
        dense, compressed: titles of the columns.
    """
    height = max(PHOTO, ROW * max((len(one.dense) for _, one in shown), default=0))
    left = [MARGIN, MARGIN + PHOTO + GAP, MARGIN + PHOTO + 2 * GAP + PANEL]
    top, size = MARGIN + ROW, (left[2] + PANEL + MARGIN, MARGIN + 2 * ROW + len(shown) * (height + GAP))
    page = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(page)
    for at, title in zip(left[1:], (dense, compressed), strict=True):
        pen.text((at, MARGIN), title, fill=TEXT, font=ImageFont.load_default(size=15))
    for picture, one in shown:
        page.paste(picture.resize((PHOTO, PHOTO), Image.Resampling.LANCZOS), (left[0], top))
        both = {name for name, _ in one.dense} & {name for name, _ in one.compressed}
        for at, ranked in zip(left[1:], (one.dense, one.compressed), strict=True):
            _bars(pen, (at, top), ranked, both)
        top += height + GAP
    font = ImageFont.load_default(size=12)
    for colour, meaning, at in ((SHARED, "both networks name it", left[1]), (OWN, "only one does", left[2])):
        pen.rectangle([at, top + 4, at + 16, top + 11], fill=colour)
        pen.text((at + 22, top), meaning, fill=FAINT, font=font)
    return page


def _bars(pen: ImageDraw.ImageDraw, corner: tuple[int, int], ranked: Ranked, shared: set[str]) -> None:
    """The classes of one network below each other, each its name over its bar, and how likely it is behind that."""
    left, top = corner
    for number, (name, share) in enumerate(ranked):
        at = top + number * ROW
        pen.text((left, at), name, fill=TEXT, font=ImageFont.load_default(size=13))
        end = left + max(1, round(BAR * share))
        pen.rectangle([left, at + 17, end, at + 24], fill=SHARED if name in shared else OWN)
        pen.text((end + 6, at + 14), f"{100 * share:.1f} %", fill=FAINT, font=ImageFont.load_default(size=11))
