# SPDX-License-Identifier: AGPL-3.0-or-later
"""The silhouettes of base classes that grow or move by themselves: animals, plants, fruit."""

from fsdet.data.drawing.geometry import (
    Part,
    accent,
    body,
    both,
    box,
    curve,
    disc,
    eyes,
    mark,
    paint,
    points,
    spikes,
    stroke,
    symmetric,
    turned,
    wedge,
)


def fish() -> list[Part]:
    tail = curve("-42,0 -98,-50 -98,-50 -82,0 -98,50 -98,50", 4)
    fins = points("-20,-40 18,-74 34,-34"), points("-8,42 4,66 26,36")
    return [accent(tail, *fins), body(curve("98,2 60,-34 10,-48 -40,-26 -58,0 -40,26 10,48 60,36")),
            mark("dark", stroke("38,-28 28,2 38,30", 6, True)), *eyes(66, -8, 12)]  # fmt: skip


def mushroom() -> list[Part]:
    cap = curve("-96,10 -96,10 -84,-46 -40,-84 0,-92 40,-84 84,-46 96,10 96,10 50,22 0,24 -50,22")
    return [paint("cream", symmetric("0,8 26,8 24,50 36,92 0,97")), body(cap), accent(box(-32, 22, 32, 38, 6))]


def butterfly() -> list[Part]:
    upper = curve("4,-6 20,-66 64,-92 96,-78 90,-28 50,6")
    lower = curve("4,6 50,10 76,36 62,80 34,86 10,46")
    feelers = both(stroke("4,-44 12,-74 26,-88", 5, True))
    return [accent(*both(lower)), body(*both(upper)), mark("white", *both(disc(70, -56, 10))),
            mark("dark", *feelers), paint("dark", disc(0, 2, 9, 52))]  # fmt: skip


def cat() -> list[Part]:
    head = symmetric("0,-46 40,-52 40,-52 80,-98 80,-98 90,-40 92,6 78,44 42,72 0,80")
    whiskers = both(stroke("30,34 90,24", 4)) + both(stroke("30,42 88,52", 4))
    return [body(head), mark("pink", *both(points("52,-46 72,-72 76,-24"))), *eyes(0, -2, 18, 38),
            accent(disc(0, 44, 30, 22)), mark("dark", points("-10,32 10,32 0,44"), *whiskers)]  # fmt: skip


def snowman() -> list[Part]:
    buttons = [disc(0, y, 6) for y in (30, 52, 74)]
    return [body(disc(0, 52, 48)), body(disc(0, -26, 34)), accent(box(-32, -6, 32, 10, 7), box(8, 4, 24, 40, 4)),
            mark("dark", *both(disc(12, -36, 6)), *buttons), paint("orange", points("0,-30 34,-22 0,-18")),
            paint("dark", box(-38, -66, 38, -55, 4), box(-24, -100, 24, -58, 3))]  # fmt: skip


def apple() -> list[Part]:
    fruit = symmetric("0,-46 30,-60 70,-46 84,0 66,60 32,92 0,82")
    return [paint("brown", stroke("0,-40 4,-66 14,-92", 11, True)), accent(curve("12,-66 36,-98 78,-92 78,-92 54,-62")),
            body(fruit), mark("white", curve("-62,-8 -52,-34 -36,-38 -46,-14"))]  # fmt: skip


def pear() -> list[Part]:
    fruit = symmetric("0,-74 22,-66 28,-32 60,14 66,58 40,92 0,98")
    return [paint("brown", stroke("0,-68 -4,-84 4,-102", 10, True)),
            accent(curve("4,-80 30,-100 62,-88 62,-88 36,-70")), body(fruit),
            mark("white", curve("-46,44 -42,22 -30,14 -34,40"))]  # fmt: skip


def cherries() -> list[Part]:
    stems = stroke("-46,34 -30,-30 26,-88", 8, True), stroke("48,48 50,-20 26,-88", 8, True)
    return [paint("green", *stems), accent(curve("26,-86 60,-104 98,-78 98,-78 62,-60")),
            body(disc(-48, 52, 42)), body(disc(52, 60, 40)),
            mark("white", disc(-62, 38, 9), disc(38, 46, 9))]  # fmt: skip


def carrot() -> list[Part]:
    tops = [turned(curve("0,-40 16,-70 0,-102 -16,-70"), a, 0, -40) for a in (-32, 0, 32)]
    root = symmetric("0,-46 36,-42 34,-6 16,60 0,100 0,100")
    return [accent(*tops), body(root), mark("dark", stroke("-32,-10 -8,-8", 5), stroke("28,16 6,18", 5),
            stroke("-20,36 -4,38", 5))]  # fmt: skip


def duck() -> list[Part]:
    breast = curve(
        "-98,-14 -98,-14 -60,10 -10,0 10,-30 12,-70 40,-92 70,-80 78,-48 64,-16 78,20 60,64 10,84 -50,76 -86,40"
    )
    return [accent(curve("70,-62 104,-56 104,-44 72,-36")), body(breast),
            accent(curve("-46,14 -46,14 10,12 34,34 0,58 -34,46")), *eyes(50, -62, 11)]  # fmt: skip


def owl() -> list[Part]:
    trunk = symmetric("0,-72 30,-76 62,-98 62,-98 66,-40 66,30 46,80 0,94")
    return [paint("orange", *both(disc(24, 92, 14, 9))), body(trunk), accent(disc(0, 42, 34, 42)),
            paint("white", *both(disc(29, -36, 28))), mark("dark", *both(disc(25, -34, 13))),
            paint("orange", points("-10,-18 10,-18 0,6"))]  # fmt: skip


def turtle() -> list[Part]:
    feet = box(-62, 26, -34, 62, 10), box(28, 26, 56, 62, 10)
    return [accent(*feet, curve("56,30 70,-10 92,-16 104,4 90,22 76,42"), points("-70,22 -98,40 -68,40")),
            body(wedge(-4, 34, 76, 180, 360, 80)), accent(box(-86, 26, 74, 42, 8)),
            mark("dark", disc(90, -2, 5))]  # fmt: skip


def whale() -> list[Part]:
    hull = curve("98,10 84,-32 30,-48 -30,-34 -60,0 -74,-30 -100,-54 -100,-54 -94,-6 -70,36 -20,66 50,68 90,46")
    spout = stroke("40,-46 38,-74 16,-90", 8, True), stroke("42,-46 44,-74 66,-90", 8, True)
    return [paint("sky", *spout), body(hull), accent(curve("97,22 50,34 -10,36 -50,50 -10,68 50,68 90,46")),
            *eyes(66, -2, 9), mark("dark", stroke("96,16 80,22 66,18", 5, True))]  # fmt: skip


def crab() -> list[Part]:
    claw = curve("70,-18 98,-46 92,-88 70,-60 70,-60 56,-88 44,-52 56,-24")
    legs = [stroke(f"44,{y} 78,{y + d} 92,{y + d + 22}", 9, True) for y, d in ((14, -2), (30, 4), (44, 10))]
    return [paint("body", *(f for leg in legs for f in both(leg)), *both(stroke("46,6 70,-4 66,-30", 11, True))),
            accent(*both(claw)), paint("dark", *both(box(14, -48, 20, -14))), body(disc(0, 20, 62, 42)),
            *eyes(0, -48, 14, 17), mark("dark", stroke("-20,36 0,44 20,36", 6, True))]  # fmt: skip


def rabbit() -> list[Part]:
    ear = curve("14,-10 8,-60 24,-98 46,-92 46,-50 36,-6")
    inner = curve("22,-22 18,-58 28,-82 38,-76 38,-50 30,-20")
    return [body(*both(ear)), mark("pink", *both(inner)), body(symmetric("0,-20 44,-8 64,34 50,76 0,92")),
            *eyes(0, 26, 12, 26), accent(*both(disc(15, 60, 17, 15))), mark("pink", points("-9,44 9,44 0,54")),
            paint("white", box(-9, 70, 9, 88, 3))]  # fmt: skip


def tulip() -> list[Part]:
    bloom = curve("-44,-98 -44,-98 -20,-66 0,-100 0,-100 20,-66 44,-98 44,-98 50,-50 34,-16 0,-6 -34,-16 -50,-50")
    leaves = curve("0,92 10,40 56,6 56,6 50,60"), curve("0,92 -12,52 -52,26 -52,26 -44,70")
    return [paint("green", box(-5, -12, 5, 100)), accent(*leaves), body(bloom)]


def ghost() -> list[Part]:
    sheet = curve("-66,96 -66,96 -68,-20 -50,-76 0,-98 50,-76 68,-20 66,96 66,96 44,72 22,94 0,72 -22,94 -44,72")
    return [body(sheet), mark("dark", *both(disc(24, -32, 13, 18)), disc(0, 14, 13, 18)),
            accent(*both(disc(44, 2, 11, 7)))]  # fmt: skip


def bone() -> list[Part]:
    knobs = [disc(x, y, 25) for x in (-74, 74) for y in (-22, 22)]
    return [body(box(-72, -20, 72, 20), *knobs), accent(box(-16, -21, 16, 21))]


def strawberry() -> list[Part]:
    fruit = symmetric("0,-52 44,-62 80,-36 70,24 34,78 0,98")
    return [body(fruit), accent(spikes(6, 26, 58, 0, -58, 90)), paint("green", box(-5, -96, 5, -62))]
