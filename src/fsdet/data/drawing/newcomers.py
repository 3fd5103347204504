# SPDX-License-Identifier: AGPL-3.0-or-later
"""The silhouettes of novel classes; none of them is used by a base class."""

import numpy as np

from fsdet.data.drawing.geometry import (
    Part,
    accent,
    body,
    both,
    box,
    curve,
    disc,
    eyes,
    flipped,
    mark,
    paint,
    points,
    spikes,
    stroke,
    symmetric,
    turned,
    wedge,
)


def teapot() -> list[Part]:
    handle = [curve("-44,-36 -88,-44 -100,0 -80,44 -44,52"), curve("-56,-18 -76,-22 -82,2 -70,26 -54,32")]
    spout = curve("46,30 46,30 70,-4 74,-40 104,-48 104,-48 92,-6 62,62 40,62")
    return [accent(handle, spout), body(symmetric("0,-48 40,-44 64,-4 62,42 42,78 0,82")),
            accent(wedge(0, -44, 42, 180, 360, 24), disc(0, -74, 12))]  # fmt: skip


def cactus() -> list[Part]:
    arms = stroke("0,16 42,14 56,0 56,-44", 24, True), stroke("0,-10 -40,-12 -52,-26 -52,-62", 24, True)
    tips = disc(56, -44, 12), disc(-52, -62, 12)
    return [body(*arms, *tips, box(-24, -98, 24, 56, 23)), accent(points("-50,44 50,44 38,100 -38,100")),
            accent(box(-58, 36, 58, 56, 4)), paint("pink", spikes(5, 8, 17, 4, -96))]  # fmt: skip


def penguin() -> list[Part]:
    wings = both(curve("44,-26 72,6 80,48 64,44 48,24"))
    return [paint("orange", *both(disc(24, 92, 22, 9))), body(*wings),
            body(symmetric("0,-98 36,-86 46,-40 58,20 50,74 0,92")),
            paint("white", symmetric("0,-12 30,-14 40,30 32,72 0,80"), *both(disc(17, -50, 20, 24))),
            mark("dark", *both(disc(16, -52, 7))), paint("orange", points("-12,-40 12,-40 0,-18")),
            accent(box(-46, -26, 46, -8, 6))]  # fmt: skip


def octopus() -> list[Part]:
    legs = [stroke(t, 17, True) for t in ("10,20 20,60 6,94", "30,20 50,56 44,92", "44,10 78,34 96,76")]
    return [body(*(f for leg in legs for f in both(leg)), symmetric("0,-98 46,-84 66,-36 52,24 0,40")),
            *eyes(0, -26, 16, 25), mark("dark", stroke("-14,8 0,16 14,8", 6, True)),
            accent(*both(disc(46, -60, 8)), disc(0, -76, 9))]  # fmt: skip


def guitar() -> list[Part]:
    frets = [box(-9, y, 9, y + 4) for y in (-66, -50, -34, -18)]
    return [paint("brown", box(-10, -80, 10, 20)), mark("metal", *frets),
            accent(points("-17,-102 17,-102 13,-76 -13,-76")),
            body(symmetric("0,-2 38,-8 46,18 36,34 62,58 52,94 0,102")), paint("dark", disc(0, 36, 17)),
            paint("brown", box(-24, 70, 24, 80)), mark("white", box(-2, -74, 2, 72))]  # fmt: skip


def scissors() -> list[Part]:
    blade, loop = points("-10,30 38,-100 46,-60 12,44"), [disc(-36, 68, 32), disc(-36, 68, 17)]
    return [paint("metal", *both(blade)), body(loop, [flipped(o) for o in loop], *both(stroke("8,14 -24,52", 17))),
            accent(disc(0, 8, 9))]  # fmt: skip


def bulb() -> list[Part]:
    return [body(symmetric("0,-100 42,-88 60,-48 44,-12 25,14 24,44 0,46")),
            mark("dark", stroke("-13,44 -20,-16 -7,-34 7,-34 20,-16 13,44", 5, True)),
            accent(box(-33, 40, 33, 58, 6), box(-30, 58, 30, 76, 6)),
            paint("dark", wedge(0, 76, 20, 0, 180, 22))]  # fmt: skip


def saucer() -> list[Part]:
    beam = points("-26,30 26,30 58,96 -58,96")
    lamps = [disc(x, y, 9) for x, y in ((-68, 10), (-34, 20), (0, 23), (34, 20), (68, 10))]
    return [mark("yellow", beam), paint("sky", wedge(0, -8, 46, 180, 360, 56)), mark("white", disc(-18, -34, 8, 11)),
            body(disc(0, 8, 100, 32)), accent(*lamps)]  # fmt: skip


def pineapple() -> list[Part]:
    tuft = [turned(curve("0,-24 15,-60 0,-102 -15,-60"), a, 0, -24) for a in (-62, 62, -32, 32, 0)]
    return [*(accent(t) for t in tuft), body(symmetric("0,-32 36,-24 52,20 40,74 0,96"))]


def snail() -> list[Part]:
    foot = curve("-98,70 -60,52 30,52 52,30 56,-20 76,-34 92,-14 88,30 74,62 40,78 -60,80")
    horns = stroke("70,-28 64,-62", 6), stroke("80,-28 92,-60", 6)
    return [accent(*horns, disc(63, -64, 8), disc(93, -62, 8)), accent(foot), body(disc(-16, 2, 62)),
            mark("dark", stroke("-16,2 -6,-6 -22,-20 -40,-2 -24,24 12,16 22,-14 2,-42 -34,-42", 6, True)),
            mark("dark", disc(76, -8, 6))]  # fmt: skip


def helicopter() -> list[Part]:
    cabin = curve("-30,6 -20,-32 30,-40 74,-16 86,22 62,48 0,50 -24,36")
    return [paint("dark", box(22, -72, 32, -34), box(-62, -80, 104, -68, 5)),
            body(points("-18,-8 -98,-12 -98,2 -18,30")), accent(points("-104,-44 -84,-44 -78,24 -98,24")), body(cabin),
            paint("sky", curve("34,-32 70,-12 80,16 34,16", 4)),
            paint("dark", box(-22, 70, 80, 80, 5)), mark("dark", stroke("2,48 -4,72", 7), stroke("52,48 60,72", 7)),
            mark("accent", box(-24, 24, 80, 34))]  # fmt: skip


def padlock() -> list[Part]:
    shackle = [symmetric("0,-100 40,-86 54,-46 54,20 54,20 0,20"), symmetric("0,-74 24,-66 32,-40 32,20 32,20 0,20")]
    return [paint("metal", shackle), body(box(-76, -18, 76, 96, 16)),
            accent(disc(0, 26, 19)), accent(points("-9,34 9,34 14,70 -14,70"))]  # fmt: skip


def magnet() -> list[Part]:
    outer = curve("-92,-92 -92,-92 -92,10 -64,72 0,96 64,72 92,10 92,-92 92,-92", 4)
    inner = curve("36,-92 36,-92 36,6 24,32 0,42 -24,32 -36,6 -36,-92 -36,-92", 4)
    return [body(np.concatenate([outer[:-3], inner[:-3]])), accent(*both(box(36, -94, 92, -56)))]


def puzzle() -> list[Part]:
    top, right = wedge(0, -78, 25, 130, 410), wedge(78, 0, 25, 220, 500)
    bottom, left = wedge(0, 46, 25, 50, -230), wedge(-46, 0, 25, 140, -140)
    corners = points("-62,-62 62,-62 62,62 -62,62")
    ring = [corners[:1], top, corners[1:2], right, corners[2:3], bottom, corners[3:], left]
    return [body(np.concatenate(ring)), accent(disc(0, 0, 15))]


def trophy() -> list[Part]:
    grip = [curve("40,-76 92,-80 90,-30 40,-6"), curve("48,-60 74,-62 72,-38 46,-22")]
    return [accent(grip, [flipped(o) for o in grip]), body(box(-9, 10, 9, 66)),
            body(symmetric("0,-92 56,-92 56,-92 50,-20 22,14 0,20")), paint("brown", box(-46, 62, 46, 98, 5)),
            mark("yellow", box(-24, 72, 24, 88)), accent(spikes(5, 10, 25, 0, -48))]  # fmt: skip


def windmill() -> list[Part]:
    sails = [turned(points("-4,-8 4,-8 4,-30 26,-30 26,-92 -4,-92"), a) for a in (45, 135, 225, 315)]
    shifted = [s * 0.78 + points("0,-30") for s in sails]
    return [body(points("-36,-22 36,-22 54,100 -54,100")), accent(wedge(0, -20, 42, 180, 360, 44)),
            paint("brown", symmetric("0,52 16,62 18,100 18,100 0,100")), paint("white", *shifted),
            paint("dark", disc(0, -30, 10))]  # fmt: skip
