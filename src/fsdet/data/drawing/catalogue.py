# SPDX-License-Identifier: AGPL-3.0-or-later
"""The classes of the demo set: a silhouette, a pattern and three colours each.

A row reads: name | silhouette | pattern, its periods across the object, its angle in degrees | body, ink, accent.
"""

from dataclasses import dataclass
from functools import cached_property
from types import ModuleType

import numpy as np

from fsdet.data.drawing import creatures, newcomers, silhouettes
from fsdet.data.drawing.geometry import Part, fitted

PALETTE = {
    "red": (222, 56, 58), "crimson": (170, 26, 52), "orange": (245, 134, 36), "amber": (250, 178, 44),
    "yellow": (252, 216, 66), "cream": (250, 236, 204), "tan": (222, 178, 118), "brown": (134, 84, 48),
    "chocolate": (92, 56, 38), "lime": (160, 208, 60), "green": (58, 160, 78), "forest": (28, 102, 62),
    "mint": (150, 226, 190), "teal": (24, 146, 146), "sky": (142, 206, 244), "blue": (48, 116, 214),
    "navy": (34, 54, 118), "violet": (124, 78, 190), "lilac": (200, 164, 232), "magenta": (212, 58, 150),
    "pink": (250, 160, 184), "white": (250, 250, 246), "metal": (186, 194, 204), "grey": (122, 130, 142),
    "dark": (44, 44, 54),
}  # fmt: skip

BASE_ROWS = """
gold star | star | plain 4 0 | yellow yellow orange
starry blue star | star | dots 6 0 | blue white navy
red heart | heart | plain 4 0 | red red pink
checked heart | heart | checks 6 30 | magenta cream pink
striped fish | fish | stripes 5 0 | orange white amber
dotted fish | fish | dots 6 0 | teal yellow lime
blue mug | mug | waves 4 0 | blue white sky
dotted mug | mug | dots 5 0 | red cream amber
cottage | house | grid 6 0 | cream tan red
brick house | house | checks 7 0 | red orange grey
pine tree | pine | zigzag 6 0 | green forest green
strawberry | strawberry | diamonds 7 0 | red yellow green
brass key | key | plain 4 0 | amber amber brown
steel gear | gear | rings 5 0 | metal grey blue
copper gear | gear | rays 6 0 | orange brown teal
road arrow | arrow | zigzag 6 90 | yellow dark red
castle | castle | grid 6 0 | metal grey red
sleepy moon | crescent | plain 4 0 | amber amber yellow
dog bone | bone | plain 4 0 | cream cream sky
lightning bolt | bolt | plain 4 0 | yellow yellow orange
toadstool | mushroom | spots 4 0 | red white cream
brown mushroom | mushroom | rings 4 0 | brown tan tan
striped umbrella | umbrella | stripes 5 0 | violet white magenta
candle | candle | stripes 5 60 | cream violet amber
bell | bell | stripes 4 90 | amber orange red
green bottle | bottle | plain 4 0 | forest forest red
anchor | anchor | plain 4 0 | navy navy metal
leaf | leaf | plain 4 0 | lime lime forest
autumn leaf | leaf | halves 1 0 | orange red brown
butterfly | butterfly | spots 5 0 | blue navy sky
tiger butterfly | butterfly | stripes 7 40 | orange dark yellow
red car | car | plain 4 0 | red red yellow
taxi | car | checks 9 0 | yellow dark white
sailboat | sailboat | stripes 5 90 | sky blue red
rocket | rocket | stripes 4 90 | white red red
tabby cat | cat | stripes 7 0 | orange brown cream
grey cat | cat | plain 4 0 | grey grey white
crown | crown | diamonds 4 0 | amber crimson violet
first-aid cross | cross | plain 4 0 | red red white
hourglass | hourglass | plain 4 0 | sky sky amber
wooden spoon | spoon | pinstripes 9 0 | tan brown brown
claw hammer | hammer | plain 4 0 | grey grey amber
snowman | snowman | plain 4 0 | white white red
red apple | apple | pinstripes 7 10 | red yellow green
green apple | apple | plain 4 0 | lime lime brown
pear | pear | spots 7 0 | yellow lime green
cherries | cherries | plain 4 0 | crimson crimson green
carrot | carrot | plain 4 0 | orange orange green
ice cream | icecream | waves 4 0 | pink cream red
mint ice cream | icecream | spots 6 0 | mint chocolate chocolate
cupcake | cupcake | pluses 5 0 | lilac yellow sky
wine glass | glass | plain 4 0 | sky sky crimson
table lamp | lamp | pinstripes 6 0 | lime forest brown
alarm clock | clock | plain 4 0 | teal teal amber
hot-air balloon | balloon | stripes 5 0 | red yellow teal
checked balloon | balloon | checks 6 0 | sky violet navy
kite | kite | halves 1 0 | lime blue red
checked kite | kite | checks 5 45 | orange white violet
flag | flag | stripes 5 90 | blue white amber
gift box | gift | dots 6 0 | teal white red
football shirt | shirt | stripes 5 0 | green white dark
plaid shirt | shirt | grid 5 0 | red navy navy
jeans | trousers | plain 4 0 | blue blue brown
striped sock | sock | stripes 6 90 | lime violet violet
rubber boot | boot | dots 5 0 | amber red red
witch hat | hat | plain 4 0 | navy navy magenta
mitten | mitten | zigzag 5 0 | crimson white white
city bus | bus | plain 4 0 | orange orange white
airliner | plane | plain 4 0 | white white blue
rubber duck | duck | plain 4 0 | yellow yellow orange
owl | owl | zigzag 7 0 | brown tan cream
turtle | turtle | diamonds 4 0 | forest lime lime
whale | whale | plain 4 0 | navy navy sky
crab | crab | spots 6 0 | red orange red
rabbit | rabbit | plain 4 0 | tan tan white
tulip | tulip | pinstripes 6 0 | magenta pink green
sword | sword | plain 4 0 | metal metal amber
shield | shield | halves 1 0 | crimson white navy
ghost | ghost | plain 4 0 | white white pink
robot | robot | grid 4 0 | metal teal red
"""

NOVEL_ROWS = """
teapot | teapot | dots 5 0 | sky white navy
cactus | cactus | pinstripes 8 0 | green lime orange
penguin | penguin | plain 4 0 | dark dark red
octopus | octopus | spots 6 0 | violet pink magenta
guitar | guitar | rings 5 0 | amber brown red
scissors | scissors | plain 4 0 | red red amber
light bulb | bulb | rays 6 0 | yellow cream grey
flying saucer | saucer | stripes 6 0 | metal violet lime
pineapple | pineapple | diamonds 5 0 | amber brown green
snail | snail | rings 4 0 | orange cream tan
helicopter | helicopter | checks 6 0 | green yellow dark
padlock | padlock | stripes 5 90 | amber yellow dark
magnet | magnet | plain 4 0 | crimson crimson metal
puzzle piece | puzzle | waves 4 0 | teal mint blue
trophy | trophy | stripes 6 0 | yellow amber white
windmill | windmill | grid 6 0 | pink white blue
"""


@dataclass(frozen=True, eq=False)
class Kind:
    """One class. `parts` back to front in unit coordinates; `periods` and `angle` (degrees) belong to the pattern."""

    name: str
    silhouette: str
    parts: tuple[Part, ...]
    pattern: str
    periods: float
    angle: float
    body: tuple[int, int, int]
    ink: tuple[int, int, int]
    accent: tuple[int, int, int]

    @cached_property
    def slimness(self) -> float:
        """Shorter over longer side of the drawing, 0..1."""
        every = np.concatenate([o for p in self.parts for r in p.regions for o in r])
        sides = np.ptp(every, 0)
        return float(sides.min() / sides.max())


def _kind(row: str, modules: tuple[ModuleType, ...]) -> Kind:
    name, silhouette, pattern, colours = (cell.strip() for cell in row.split("|"))
    drawing = next(getattr(m, silhouette) for m in modules if hasattr(m, silhouette))
    style, periods, angle = pattern.split()
    paints = (PALETTE[c] for c in colours.split())
    return Kind(name, silhouette, fitted(drawing()), style, float(periods), float(angle), *paints)


BASE: tuple[Kind, ...] = tuple(_kind(r, (silhouettes, creatures)) for r in BASE_ROWS.strip().splitlines())
NOVEL: tuple[Kind, ...] = tuple(_kind(r, (newcomers,)) for r in NOVEL_ROWS.strip().splitlines())
KINDS: tuple[Kind, ...] = BASE + NOVEL
