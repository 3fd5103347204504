# SPDX-License-Identifier: AGPL-3.0-or-later
"""The silhouettes of base classes: things, vehicles and buildings. One function a drawing, back to front."""

from fsdet.data.drawing.geometry import (
    Part,
    accent,
    body,
    both,
    box,
    cog,
    curve,
    disc,
    flipped,
    mark,
    mirrored,
    paint,
    points,
    spikes,
    stroke,
    symmetric,
    wedge,
)


def star() -> list[Part]:
    return [body(spikes(5, 44)), accent(spikes(5, 19, 42))]


def heart() -> list[Part]:
    return [body(symmetric("0,-52 0,-52 30,-88 70,-88 98,-55 92,-10 55,40 0,92 0,92")),
            mark("white", curve("-72,-40 -60,-66 -38,-70 -50,-52 -62,-30"))]  # fmt: skip


def mug() -> list[Part]:
    handle = [curve("40,-40 85,-40 100,0 85,45 40,50"), curve("50,-18 72,-18 80,4 72,25 50,28")]
    return [accent(handle), body(box(-80, -70, 52, 85, 14)), paint("white", disc(-14, -68, 64, 14)),
            mark("brown", disc(-14, -66, 52, 8))]  # fmt: skip


def house() -> list[Part]:
    return [paint("brown", box(40, -90, 64, -30)), body(box(-74, -20, 74, 92)),
            accent(points("-100,-12 0,-95 100,-12")), paint("brown", box(-14, 30, 22, 92)),
            paint("sky", box(-58, 8, -28, 40), box(38, 8, 64, 40))]  # fmt: skip


def pine() -> list[Part]:
    tiers = [mirrored(f"0,{y} {w},{y + h} 0,{y + h}") for y, w, h in ((-20, 74, 82), (-62, 60, 72), (-100, 44, 62))]
    return [paint("brown", box(-14, 55, 14, 100)), *(body(t) for t in tiers)]


def key() -> list[Part]:
    return [body([disc(-55, 0, 45), disc(-62, 0, 18)], box(-15, -11, 100, 11), box(52, 5, 68, 42), box(82, 5, 98, 34)),
            accent([disc(-55, 0, 45), disc(-55, 0, 34)])]  # fmt: skip


def gear() -> list[Part]:
    return [body([cog(8, 72, 100), disc(0, 0, 22)]), accent([disc(0, 0, 40), disc(0, 0, 22)])]


def arrow() -> list[Part]:
    return [body(points("-100,-28 15,-28 15,-72 100,0 15,72 15,28 -100,28")),
            accent(points("-100,-28 -62,-28 -62,28 -100,28"))]  # fmt: skip


def crescent() -> list[Part]:
    moon = curve("30,-95 30,-95 -30,-88 -75,-50 -88,0 -75,50 -30,88 30,95 30,95 -12,55 -28,0 -12,-55")
    return [body(moon), mark("dark", stroke("-66,-18 -56,-8 -46,-16", 8, True)), accent(spikes(5, 12, 28, 42, 0))]


def bolt() -> list[Part]:
    return [body(points("12,-100 -58,12 -8,12 -28,100 58,-22 8,-22 44,-100")),
            mark("white", points("14,-84 -34,-4 -20,-4 24,-84"))]  # fmt: skip


def umbrella() -> list[Part]:
    canopy = symmetric("0,-88 50,-74 88,-36 98,8 98,8 66,-10 34,8 34,8 0,-10")
    handle = stroke("0,-8 0,60 0,76 10,90 26,90 34,76", 10, True)
    ribs = stroke("0,-86 -28,-50 -34,6", 5, True), stroke("0,-86 28,-50 34,6", 5, True)
    return [paint("brown", handle), body(canopy), mark("dark", *ribs), accent(box(-6, -104, 6, -84, 4))]


def bell() -> list[Part]:
    bulb = symmetric("0,-78 34,-68 52,-30 56,20 84,58 84,58 0,62")
    return [accent([disc(0, -86, 18), disc(0, -86, 8)], disc(0, 72, 20)), body(bulb),
            accent(box(-92, 50, 92, 68, 9))]  # fmt: skip


def bottle() -> list[Part]:
    glass = symmetric("14,-70 14,-70 16,-40 44,-12 48,10 48,90 42,98 0,99")
    return [body(glass), accent(box(-20, -100, 20, -70, 5)), paint("white", box(-48, 22, 48, 62)),
            mark("dark", box(-30, 34, 30, 40), box(-20, 46, 20, 51))]  # fmt: skip


def anchor() -> list[Part]:
    arms = curve("-86,20 -86,20 -58,62 0,74 58,62 86,20 86,20 92,58 60,88 0,100 -60,88 -92,58", 4)
    tips = both(points("66,34 90,2 100,44"))
    return [body([disc(0, -78, 23), disc(0, -78, 10)], box(-11, -60, 11, 88), arms, *tips),
            accent(box(-50, -44, 50, -24, 8))]  # fmt: skip


def leaf() -> list[Part]:
    blade = curve("0,-98 0,-98 40,-62 58,-10 40,40 0,66 0,66 -40,40 -58,-10 -40,-62")
    ribs = [stroke(f"0,{y} {x},{y - 26}", 5) for y in (-20, 12, 42) for x in (-30, 30)]
    return [paint("brown", stroke("0,50 4,80 14,100", 9, True)), body(blade), accent(stroke("0,-70 0,60", 8)),
            mark("accent", *ribs)]  # fmt: skip


def car() -> list[Part]:
    shell = curve("-98,40 -98,40 -98,5 -70,-8 -50,-14 -28,-50 -10,-56 30,-56 50,-48 68,-8 92,0 98,20 98,40 98,40", 4)
    return [body(shell), paint("sky", points("-36,-12 -20,-42 2,-42 2,-12"), points("12,-12 12,-42 36,-42 52,-12")),
            paint("dark", disc(-54, 42, 25), disc(56, 42, 25)), mark("metal", disc(-54, 42, 12), disc(56, 42, 12)),
            accent(box(-98, 12, -80, 26, 5)), mark("yellow", disc(90, 14, 8))]  # fmt: skip


def sailboat() -> list[Part]:
    hull = curve("-96,44 -96,44 96,44 96,44 60,88 -55,88", 4)
    return [paint("brown", box(-5, -100, 5, 46)), body(points("10,-92 10,28 86,28")),
            paint("white", points("-10,-76 -10,28 -66,28")), accent(hull),
            mark("white", box(-72, 54, 74, 62))]  # fmt: skip


def rocket() -> list[Part]:
    hull = symmetric("0,-100 0,-100 28,-62 36,-10 26,50 26,50 0,50")
    return [paint("orange", symmetric("0,48 18,50 14,80 0,102")), accent(*both(points("26,8 66,56 60,78 22,46"))),
            body(hull), accent(symmetric("0,-100 0,-100 18,-78 27,-58 27,-58 0,-54")),
            paint("sky", disc(0, -22, 16))]  # fmt: skip


def crown() -> list[Part]:
    top = points("-90,60 -100,-46 -50,8 0,-74 50,8 100,-46 90,60")
    return [body(top), accent(box(-90, 48, 90, 82, 6), disc(-98, -52, 13), disc(0, -80, 14), disc(98, -52, 13)),
            mark("white", disc(-50, 65, 8), disc(0, 65, 10), disc(50, 65, 8))]  # fmt: skip


def cross() -> list[Part]:
    plus = points("-34,-98 34,-98 34,-34 98,-34 98,34 34,34 34,98 -34,98 -34,34 -98,34 -98,-34 -34,-34")
    return [body(plus), accent(plus * 0.45)]


def hourglass() -> list[Part]:
    glass = symmetric("0,-84 52,-84 52,-84 48,-40 10,-4 10,4 48,40 52,84 52,84 0,84")
    return [body(glass), mark("accent", symmetric("0,-34 36,-34 36,-34 5,0 0,40 5,44 40,80 0,80")),
            paint("brown", box(-66, -100, 66, -78, 6), box(-66, 78, 66, 100, 6))]  # fmt: skip


def spoon() -> list[Part]:
    return [body(stroke("0,-20 0,96", 17), disc(0, 94, 12), disc(0, -56, 34, 44)), accent(disc(0, -58, 22, 31))]


def hammer() -> list[Part]:
    head = curve("-62,-92 -62,-92 10,-92 40,-96 88,-66 88,-66 44,-62 20,-48 -62,-48 -62,-48", 4)
    return [accent(box(-22, -60, 4, 100, 9)), body(head, box(-80, -98, -54, -42, 4)), mark("dark", box(-22, 55, 4, 62))]


def icecream() -> list[Part]:
    scoop = curve("-48,0 -62,-16 -52,-58 -26,-84 0,-88 26,-84 52,-58 62,-16 48,0 30,8 12,-2 -8,10 -28,-2")
    lines = stroke("-26,10 14,66", 5), stroke("26,10 -14,66", 5), stroke("0,4 26,36", 5), stroke("0,4 -26,36", 5)
    return [paint("tan", points("-50,-8 50,-8 0,104")), mark("brown", *lines), body(scoop), accent(disc(0, -90, 17))]


def cupcake() -> list[Part]:
    frosting = symmetric("0,-72 26,-62 34,-44 66,-34 66,-8 88,6 78,28 0,32")
    folds = [stroke(f"{x},26 {x * 0.8},94", 5) for x in (-40, -14, 14, 40)]
    return [accent(points("-68,18 68,18 50,98 -50,98")), mark("dark", *folds), body(frosting),
            paint("red", disc(0, -80, 18))]  # fmt: skip


def glass() -> list[Part]:
    bowl = symmetric("0,-92 50,-92 50,-92 58,-50 40,-8 10,12 0,14")
    wine = symmetric("0,-48 50,-48 50,-48 34,-12 8,4 0,5")
    return [paint("sky", box(-7, 8, 7, 88), symmetric("0,80 30,86 52,98 52,98 0,100")), body(bowl), accent(wine)]


def lamp() -> list[Part]:
    return [paint("yellow", disc(0, 8, 15)), accent(box(-7, 0, 7, 88), box(-48, 80, 48, 100, 8)),
            body(points("-38,-98 38,-98 78,4 -78,4")), accent(box(-42, -102, 42, -92))]  # fmt: skip


def clock() -> list[Part]:
    legs = both(stroke("40,60 62,96", 16))
    return [paint("dark", *legs), accent(*both(disc(48, -72, 32, 26))), paint("dark", box(-6, -94, 6, -70)),
            body(disc(0, 8, 80)), paint("white", disc(0, 8, 55)), mark("dark", stroke("0,8 0,-32", 9),
            stroke("0,8 28,24", 9), disc(0, 8, 8))]  # fmt: skip


def balloon() -> list[Part]:
    ropes = stroke("-24,36 -14,78", 4), stroke("24,36 14,78", 4)
    return [mark("dark", *ropes), body(symmetric("0,-100 46,-88 74,-48 64,-2 26,40 26,40 0,42")),
            accent(box(-28, 34, 28, 46, 3)), paint("brown", box(-19, 70, 19, 100, 5))]  # fmt: skip


def kite() -> list[Part]:
    tail = stroke("0,38 14,58 -8,76 8,100", 5, True)
    bow = points("-16,-9 16,9 16,-9 -16,9")
    bows = [bow + points("8,58"), bow + points("-2,80")]
    return [mark("dark", tail), accent(*bows), body(points("0,-100 58,-36 0,42 -58,-36")),
            mark("accent", stroke("0,-96 0,38", 6), stroke("-54,-36 54,-36", 6))]  # fmt: skip


def flag() -> list[Part]:
    cloth = curve("-56,-84 -56,-84 -20,-92 20,-78 56,-72 90,-82 90,-82 90,10 90,10 56,18 20,12 -20,0 -56,8 -56,8")
    return [paint("brown", box(-72, -90, -56, 100)), body(cloth), accent(disc(-64, -92, 14))]


def gift() -> list[Part]:
    loop = [curve("0,-50 20,-86 56,-90 56,-62 30,-50"), curve("18,-58 28,-74 42,-76 40,-64")]
    return [accent(loop, [flipped(o) for o in loop]), body(box(-70, -12, 70, 94)), body(box(-84, -50, 84, -12, 5)),
            accent(box(-15, -50, 15, 94))]  # fmt: skip


def shirt() -> list[Part]:
    torso = mirrored("0,-66 28,-84 52,-78 100,-34 72,0 52,-16 52,86 0,86")
    return [body(torso), accent(*both(points("100,-34 72,0 60,-10 88,-45")), wedge(0, -82, 28, 0, 180, 30)),
            mark("white", disc(26, 0, 9))]  # fmt: skip


def trousers() -> list[Part]:
    legs = mirrored("0,-90 50,-90 64,98 18,98 0,-20")
    return [body(legs), accent(box(-51, -98, 51, -76)), mark("yellow", box(-9, -96, 9, -78)),
            mark("dark", stroke("0,-76 0,-26", 4))]  # fmt: skip


def sock() -> list[Part]:
    foot = curve("-30,-86 -30,-86 34,-86 34,-86 34,10 34,10 80,46 82,78 50,94 0,64 -32,40 -32,20", 4)
    return [body(foot), accent(box(-38, -98, 42, -64, 8), curve("82,50 88,74 66,94 44,90 56,68 70,46")),
            accent(curve("-32,10 0,24 0,60 -28,44"))]  # fmt: skip


def boot() -> list[Part]:
    leg = curve("-62,-92 -62,-92 10,-92 10,-92 12,0 12,0 70,18 92,48 92,72 92,72 -62,72 -62,72", 4)
    return [body(leg), accent(box(-70, -98, 18, -70, 7)),
            paint("dark", points("-66,70 96,70 96,92 -10,92 -20,84 -30,92 -66,92"))]  # fmt: skip


def hat() -> list[Part]:
    cone = curve("-48,50 -48,50 -22,-30 -8,-70 44,-98 44,-98 26,-60 34,-30 50,50 50,50", 4)
    return [body(cone), accent(points("-47,46 -38,18 42,18 49,46")), body(disc(0, 60, 98, 20)),
            paint("yellow", [box(-16, 16, 16, 46), box(-7, 24, 7, 38)])]  # fmt: skip


def mitten() -> list[Part]:
    hand = curve("-44,50 -44,50 -48,-30 -36,-76 0,-92 36,-76 44,-20 44,-14 68,-40 90,-34 88,-10 50,36 46,50 46,50")
    return [body(hand), accent(box(-54, 46, 54, 94, 14)), mark("dark", *(box(x, 56, x + 5, 84) for x in (-32, -3, 26)))]


def bus() -> list[Part]:
    panes = [box(x, -42, x + 32, -8, 4) for x in (-86, -46, -6, 34)]
    return [body(box(-100, -60, 100, 50, 16)), paint("sky", *panes, box(74, -42, 100, 4, 4)),
            accent(box(-100, 14, 100, 28)), paint("dark", disc(-54, 52, 23), disc(54, 52, 23)),
            mark("metal", disc(-54, 52, 10), disc(54, 52, 10))]  # fmt: skip


def plane() -> list[Part]:
    hull = curve("-86,-6 -40,-16 60,-16 92,-4 98,6 88,16 40,20 -60,14 -90,2", 4)
    tail = points("-92,0 -100,-52 -74,-52 -48,-8")
    return [accent(points("6,-10 -22,-62 -2,-62 44,-10"), tail), body(hull),
            accent(points("30,8 -30,78 -2,78 66,8")), mark("dark", *(disc(x, -3, 5) for x in (-20, 4, 28))),
            paint("sky", points("66,-13 90,-2 66,-1"))]  # fmt: skip


def sword() -> list[Part]:
    return [body(points("-13,-70 0,-100 13,-70 13,42 -13,42")), mark("white", box(-3, -74, 3, 38)),
            paint("brown", box(-8, 44, 8, 88)), accent(box(-46, 36, 46, 52, 8), disc(0, 90, 14))]  # fmt: skip


def shield() -> list[Part]:
    rim = symmetric("0,-86 0,-86 40,-90 82,-74 82,-74 82,0 52,62 0,98 0,98")
    return [accent(rim), body(rim * 0.8), accent(spikes(4, 14, 34, 0, -6))]


def castle() -> list[Part]:
    wall = points("-58,90 -58,-10 -40,-10 -40,8 -14,8 -14,-10 14,-10 14,8 40,8 40,-10 58,-10 58,90")
    towers = both(box(44, -30, 92, 92))
    roofs = both(points("38,-28 68,-96 98,-28"))
    return [body(wall), body(*towers), accent(*roofs), mark("dark", symmetric("0,28 22,44 24,92 24,92 0,92")),
            mark("dark", *both(box(62, 0, 74, 26, 5)))]  # fmt: skip


def candle() -> list[Part]:
    return [paint("orange", symmetric("0,-100 0,-100 16,-70 12,-52 0,-48")), mark("yellow", disc(0, -62, 6, 10)),
            mark("dark", box(-3, -54, 3, -40)), body(box(-24, -42, 24, 62, 6)),
            accent([disc(62, 60, 26), disc(62, 60, 13)], symmetric("0,56 74,56 74,56 56,92 0,94"))]  # fmt: skip


def robot() -> list[Part]:
    return [accent(box(-4, -92, 4, -60), disc(0, -94, 10), *both(box(54, 6, 82, 20, 6)), *both(box(70, 6, 86, 52, 6))),
            paint("dark", *both(box(14, 78, 38, 102, 4))), body(box(-48, -2, 48, 84, 8)),
            body(box(-58, -66, 58, -8, 14)), paint("white", *both(disc(26, -38, 15))),
            mark("dark", *both(disc(26, -38, 7))), paint("yellow", box(-26, 18, 26, 46, 4))]  # fmt: skip
