# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a reader mended, dropped or noticed, counted by kind with the places where it happened."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from fsdet.errors import DataError, counted

EXAMPLES = 1000  # places remembered per finding
SHOWN = 3  # places printed per finding
PER_KIND = 20  # places of one kind in the error of policy="fail", so that others are seen
LISTED = 30  # lines in the error of policy="fail"

# kind: (what was done about it, whether policy="fail" refuses the data because of it)
KINDS: dict[str, tuple[str, bool]] = {
    "not a number": ("dropped", True),
    "not finite": ("dropped", True),
    "negative value": ("dropped", True),
    "value above 1": ("dropped", True),
    "no width or height": ("dropped", True),
    "box outside the image": ("dropped", True),
    "box partly outside the image": ("clipped", True),
    "duplicate box": ("dropped", True),
    "unknown class": ("dropped", True),
    "class is no whole number": ("dropped", True),
    "class written as a decimal": ("mended", True),
    "wrong number of columns": ("dropped", True),
    "malformed annotation": ("dropped", True),
    "unreadable annotation file": ("dropped", True),
    "annotation of an unknown image": ("dropped", True),
    "duplicate image id": ("dropped", True),
    "missing image": ("dropped", True),
    "unreadable image": ("dropped", True),
    "annotation of an unknown video": ("dropped", True),
    "missing video": ("dropped", True),
    "unreadable video": ("dropped", True),
    "frame outside the video": ("dropped", True),
    "second box in a frame": ("dropped", True),
    "sample without annotations": ("ignored", False),
    "path leaves the data root": ("dropped", True),
    "no outline that can be read": ("dropped", True),
    "polygon": ("mended", False),
    "byte order mark": ("mended", False),
    "size missing or wrong in the annotation": ("mended", False),
    "letter case of a file name": ("mended", False),
    "foreign folder in a file name": ("mended", False),
    "stale file name": ("mended", False),
    "path": ("mended", False),
    "object of a class in neither base nor novel": ("dropped", False),
    "image without an xml file": ("dropped", False),
    "empty label file": ("background", False),
    "no label file": ("background", False),
    "label file without an image": ("ignored", False),
    "one of several jsons, none of which is read": ("ignored", False),
    "image outside the class folders": ("ignored", False),
    "folder in a class folder": ("ignored", False),
    "class name given twice": ("noted", False),
    "class without boxes": ("noted", False),
    "class absent from every source": ("noted", False),
    "key": ("ignored", False),
    "several formats": ("noted", False),
    "cannot be expressed": ("dropped", False),
}
FAULTS = ("dropped", "clipped", "mended")  # what is done about faults, the gravest first


@dataclass
class Finding:
    """One kind of thing, how often, and the first few places (`file:line` or `file: annotation id`)."""

    kind: str
    detail: str
    count: int = 0
    examples: list[str] = field(default_factory=list)

    @property
    def fault(self) -> bool:
        return KINDS[self.kind][1]

    def __str__(self) -> str:
        done = KINDS[self.kind][0]
        head = f"{done:10s} {self.count:6d}  {self.kind}{': ' + self.detail if self.detail else ''}"
        shown = ", ".join(self.examples[:SHOWN])
        more = ", ..." if self.count > SHOWN and shown else ""
        return f"{head}  ({shown}{more})" if shown else head


class Report:
    """Findings in the order of their first appearance; empty means that the data were used as they are."""

    def __init__(self) -> None:
        self._findings: dict[tuple[str, str], Finding] = {}

    def add(self, kind: str, where: str = "", detail: str = "", count: int = 1) -> None:
        """Count one more `kind` (a key of KINDS) at `where`; findings with another `detail` are kept apart."""
        assert kind in KINDS, kind
        finding = self._findings.setdefault((kind, detail), Finding(kind, detail))
        finding.count += count
        if where and len(finding.examples) < EXAMPLES:
            finding.examples.append(where)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self._findings.values())

    def __len__(self) -> int:
        return len(self._findings)

    @property
    def counts(self) -> dict[str, int]:
        """{kind: how often}, details summed."""
        counts: dict[str, int] = {}
        for finding in self:
            counts[finding.kind] = counts.get(finding.kind, 0) + finding.count
        return counts

    @property
    def faults(self) -> int:
        """How many of the findings are faults of the data rather than habits of a format."""
        return sum(finding.count for finding in self if finding.fault)

    @property
    def done(self) -> dict[str, int]:
        """{"dropped", "clipped" or "mended": how many of the faults}, those that occur."""
        done: dict[str, int] = {}
        for finding in self:
            if finding.fault:
                how = KINDS[finding.kind][0]
                done[how] = done.get(how, 0) + finding.count
        return dict(sorted(done.items(), key=lambda item: FAULTS.index(item[0])))

    def places(self) -> list[str]:
        """`file:line: what is at fault (what was done)` of the faults, EXAMPLES of each kind at most."""
        return [
            f"{place}: {finding.kind}{': ' + finding.detail if finding.detail else ''} ({KINDS[finding.kind][0]})"
            for finding in self
            if finding.fault
            for place in finding.examples or [""]
        ]

    def raise_faults(self, where: str) -> None:
        """What policy="fail" does: one DataError that lists all faults (capped, with the total)."""
        if not self.faults:
            return
        lines = [
            f"  {place or finding.detail}: {finding.kind}{' (' + finding.detail + ')' if finding.detail else ''}"
            for finding in self
            if finding.fault
            for place in finding.examples[:PER_KIND] or [""]
        ]
        rest = self.faults - len(lines[:LISTED])
        more = [f"  and {rest} more"] if rest > 0 else []
        head = f"{where}: expected labels without faults (policy 'fail'), got {counted(self.faults, 'fault')}. "
        raise DataError("\n".join([head + "Next: mend them, or load with policy 'drop'.", *lines[:LISTED], *more]))

    def __str__(self) -> str:
        return "\n".join(map(str, self)) if self._findings else "nothing to mend, nothing dropped"
