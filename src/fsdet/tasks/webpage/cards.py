# SPDX-License-Identifier: AGPL-3.0-or-later
"""An exhibit as sections of a page: a card a class, false positives, whole images, curves, the map."""

from collections.abc import Sequence

import numpy as np

from fsdet.data.images import read_rgb
from fsdet.errors import counted
from fsdet.evaluation.outcomes import CALLED, FALSE, HIT, KINDS, LOOSE, MISS, OTHER, SECOND, WEAK, Outcome
from fsdet.pictures import Picture, around
from fsdet.pictures.charts import Series, line_chart, scatter, shade_of
from fsdet.pictures.page import (
    SIDE,
    Section,
    card,
    class_card,
    keys,
    lane,
    picture,
    table,
    tiles,
)
from fsdet.tasks.webpage.exhibit import Exhibit

CARDS, PICTURES = 40, 720  # classes with a card; pictures on all of them, of 4 to 12 kB
LEAST, MOST = 1, 12  # pictures of a lane
WORST = 24  # false positives of all classes
LEGEND = 40  # classes with an entry in a legend
WHOLE = 420  # px of a whole image
TONES = {HIT: (60, 225, 120), FALSE: (255, 96, 76)}  # of boxes
WORDS = {HIT: "found", MISS: "missed", FALSE: "false"}


def sections(exhibit: Exhibit, share: float = 1.0) -> list[Section]:
    """What there is to see, in the order of a page; share: of the usual number of pictures a class."""
    by = {label: {kind: [] for kind in KINDS} for label in exhibit.shown}
    for one in exhibit.outcomes:
        by[one.label][one.kind].append(one)
    told = _order(exhibit, by)
    each = min(MOST, max(LEAST, int(share * PICTURES) // (4 * max(len(told), 1))))
    rows = {label: {HIT: _spread(of[HIT], each), MISS: of[MISS][:each], FALSE: of[FALSE][:each]}
            for label, of in by.items() if label in told}  # fmt: skip
    worst = [one for one in exhibit.outcomes if one.kind == FALSE][:WORST]
    made = _figures(exhibit, [one for of in rows.values() for kind in KINDS for one in of[kind]])
    surest = _figures(exhibit, worst, named=True)
    cards = [_card(exhibit, label, by[label], rows[label], made) for label in told]
    left = f" Cards of the {counted(len(told), 'class', 'es')} with the lowest AP50." if len(told) < len(by) else ""
    return [
        Section("Classes", _counts(exhibit, by), exhibit.told + left),
        Section("", "".join(cards)),
        Section("False positives", tiles([surest[id(one)] for one in worst]),
                "Of all classes, the surest first; under each what is there instead." if worst else ""),
        Section("Whole images", tiles([_whole(p) for p in exhibit.chosen], wide=True),
                "Dashed: the objects of these classes. Solid: what was found." if exhibit.chosen else ""),
        *_precision(exhibit),
        *_map(exhibit),
    ]  # fmt: skip


def _order(exhibit: Exhibit, by: dict) -> list[int]:
    """Classes with a card, in their own order; of many the ones with the lowest AP50 that have an object."""
    if len(by) <= CARDS:
        return list(by)
    ap50 = exhibit.ap50 if exhibit.ap50 is not None else np.zeros(len(exhibit.names))
    known = [label for label in by if by[label][HIT] or by[label][MISS]]
    return sorted(sorted(known, key=lambda label: ap50[label])[:CARDS])


def _counts(exhibit: Exhibit, by: dict) -> str:
    """A row a class."""
    marked = exhibit.ap50 is not None
    head = ["class", "images" if exhibit.whole else "objects", *WORDS.values(), *(["AP50"] if marked else []),
            *(["threshold"] if exhibit.thresholds else [])]  # fmt: skip
    rows = []
    for label, of in by.items():
        counts = [len(of[kind]) for kind in KINDS]
        row = [exhibit.names[label], str(counts[0] + counts[1]), *map(str, counts)]
        row += [_percent(exhibit.ap50[label])] if marked else []
        row += [f"{exhibit.thresholds[label]:.2f}"] if label in exhibit.thresholds else []
        rows.append(row)
    return table(head, rows, "counts by class")


def _percent(value: float) -> str:
    return f"{100 * value:.1f}" if np.isfinite(value) else "-"


def _card(exhibit: Exhibit, label: int, of: dict, shown: dict, made: dict[int, str]) -> str:
    counts = {kind: len(of[kind]) for kind in KINDS}
    facts = [f"{counts[HIT]} of {counts[HIT] + counts[MISS]} found", f"{counts[FALSE]} false"]
    facts += [f"AP50 {_percent(exhibit.ap50[label])}"] if exhibit.ap50 is not None else []
    facts += [f"from score {exhibit.thresholds[label]:.2f}"] if label in exhibit.thresholds else []
    name = exhibit.names[label]
    supports = [picture(_drawn(p), "", name=f"{name}, support {i + 1}")
                for i, p in enumerate(exhibit.supports.get(label, ()))]  # fmt: skip
    lanes = [lane("supports", supports)]
    for kind in KINDS:
        found = [made[id(one)] for one in shown[kind]]
        lanes.append(lane(f"{WORDS[kind]} ({counts[kind]})", found, kind))
    return class_card(name, facts, lanes, shade_of(label))


def _figures(exhibit: Exhibit, wanted: Sequence[Outcome], named: bool = False) -> dict[int, str]:
    """{id of an outcome: its figure}, with the class below it where `named`; every image is read once."""
    made: dict[int, str] = {}
    image, read = np.empty((0, 0, 3), np.uint8), -1
    for one in sorted(wanted, key=lambda one: one.image):
        if one.image != read:
            image, read = read_rgb(exhibit.records[one.image].path), one.image
        made[id(one)] = _figure(exhibit, one, image, named)
    return made


def _figure(exhibit: Exhibit, one: Outcome, image: np.ndarray, named: bool) -> str:
    name, why = exhibit.names[one.label], _why(exhibit, one)
    if exhibit.whole:
        shown = Picture(image)
    else:
        crop, box = around(image, one.box)
        mark = {"truth": box[None]} if one.kind == MISS else {"boxes": box[None], "colours": [TONES[one.kind]]}
        shown = Picture(crop, **mark)
    score = f"{one.score:.2f}" if one.kind != MISS else ""
    caption = " ".join(filter(None, (name if named else "", score, why)))
    return picture(_drawn(shown), caption, one.kind, f"{name}, {WORDS[one.kind]} {score} {why}".strip())


def _why(exhibit: Exhibit, one: Outcome) -> str:
    other = exhibit.names[one.other] if one.other >= 0 else ""
    words = {CALLED: f"called {other}", WEAK: f"only {one.score:.2f}", OTHER: f"is {other}", SECOND: "second box",
             LOOSE: "poor box", "nothing": "nothing there", "unseen": "not found"}  # fmt: skip
    return words.get(one.why, "")


def _drawn(shown: Picture, side: int = SIDE):
    """The picture at twice the size it has on the page, for sharp screens."""
    return shown.draw(side / max(shown.image.shape[:2]))


def _whole(shown: Picture) -> str:
    return picture(_drawn(shown, WHOLE), "", name="; ".join(shown.texts) or "nothing found", side=WHOLE)


def _spread(found: Sequence[Outcome], most: int) -> list[Outcome]:
    """At most `most`, evenly taken, from the surest to the least sure."""
    rows = np.unique(np.linspace(0, max(0, len(found) - 1), min(most, len(found))).round().astype(int))
    return [found[i] for i in rows]


def _precision(exhibit: Exhibit) -> list[Section]:
    """A line a class, and their mean."""
    if exhibit.precision is None:
        return []
    known = [c for c in exhibit.shown if np.isfinite(exhibit.precision[c]).all()]
    recall = np.linspace(0, 1, exhibit.precision.shape[1])
    lines = [Series(exhibit.names[c], recall, exhibit.precision[c], shade_of(c)) for c in known]
    if len(known) > 1:
        lines.append(Series("mean", recall, exhibit.precision[known].mean(0), "var(--ink)", bold=True))
    chart = line_chart(lines, x="recall", y="precision", limits=(0.0, 1.0))
    if not chart:
        return []
    return [Section("Precision and recall", card(chart + _legend(exhibit, known), "map"),
                    "At IoU .5 on these images, interpolated; the thick line is the mean.")]  # fmt: skip


def _map(exhibit: Exhibit) -> list[Section]:
    if exhibit.places is None or not len(exhibit.places.points):
        return []
    p = exhibit.places
    remark = (f"Two principal components ({100 * p.share:.0f} per cent of the variance): prototypes as large dots, "
              f"{'shots as squares, ' if 'shot' in p.kinds else ''}objects of the images as small dots.")  # fmt: skip
    drawn = scatter(p.points, p.classes, [exhibit.names[c] for c in p.classes], p.kinds,
                    f"map of embeddings of {counted(len(set(p.classes)), 'class', 'es')}. {remark}")  # fmt: skip
    return [Section("Embeddings", card(drawn + _legend(exhibit, sorted(set(p.classes))), "map"), remark)]


def _legend(exhibit: Exhibit, classes: Sequence[int]) -> str:
    return keys([(exhibit.names[c], shade_of(c)) for c in classes]) if len(classes) <= LEGEND else ""
