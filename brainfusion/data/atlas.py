"""An atlas is an ordered list of parcels; recordings are matched to it by name.

Shape legend: p parcels, g gradient components.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from brainfusion.runtime.errors import UserError, nearest
from brainfusion.runtime.files import read_json, write_json

_KEYS = ("name", "parcels", "xyz_mm", "gradient", "networks")


@dataclass(frozen=True, kw_only=True, eq=False)
class Atlas:
    """Parcels in order, with what is known about each.

    Raises:
        UserError: Parcel names are empty or repeat, or a table has another number of rows.
    """

    name: str
    parcels: tuple[str, ...]
    """Names, unique; their order is the order of every recording's rows."""
    xyz_mm: np.ndarray | None = None
    """float32 [p, 3]: centroids in MNI152 millimetres."""
    gradient: np.ndarray | None = None
    """float32 [p, g]: coordinates along the connectivity gradients."""
    networks: tuple[str, ...] | None = None
    """A network label for each parcel."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "parcels", tuple(self.parcels))
        _check_names(self.parcels, where=f"atlas '{self.name}'")
        for key, width in (("xyz_mm", 3), ("gradient", None)):
            if (table := getattr(self, key)) is not None:
                object.__setattr__(self, key, self._check_table(key, table, width))
        if self.networks is not None:
            object.__setattr__(self, "networks", tuple(self.networks))
            if len(self.networks) != self.n_parcels:
                raise UserError(
                    f"atlas '{self.name}' has {self.n_parcels} parcels but {len(self.networks)} "
                    "network labels: expected one a parcel, in the same order."
                )

    @property
    def n_parcels(self) -> int:
        """Number of parcels, p."""
        return len(self.parcels)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form of docs/formats.md."""
        return {
            "name": self.name,
            "parcels": list(self.parcels),
            "xyz_mm": None if self.xyz_mm is None else _round_trip(self.xyz_mm),
            "gradient": None if self.gradient is None else _round_trip(self.gradient),
            "networks": None if self.networks is None else list(self.networks),
        }

    @classmethod
    def from_dict(cls, values: Any, *, where: str = "atlas") -> "Atlas":
        """Build an atlas from its JSON form; `where` names the file in errors."""
        if not isinstance(values, dict):
            raise UserError(f"{where}: expected an object with the keys {', '.join(_KEYS)}.")
        for key in values:
            if key not in _KEYS:
                raise UserError(f"{where}: unknown key '{key}'. {nearest(str(key), _KEYS)}")
        parcels = values.get("parcels")
        if not isinstance(parcels, list):
            raise UserError(f"{where}: 'parcels' must be a list of names in order.")
        networks = values.get("networks")
        return cls(
            name=str(values.get("name") or "unnamed"),
            parcels=tuple(parcels),
            xyz_mm=_table(values.get("xyz_mm"), "xyz_mm", where),
            gradient=_table(values.get("gradient"), "gradient", where),
            networks=None if networks is None else tuple(map(str, networks)),
        )

    def save(self, path: Path) -> None:
        """Write `atlas.json`."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: Path) -> "Atlas":
        """Read `atlas.json`.

        Raises:
            UserError: The file is not there, not JSON, or not an atlas.
        """
        if not path.is_file():
            raise UserError(
                f"{path} does not exist: expected a JSON file with the keys {', '.join(_KEYS)} "
                "(docs/formats.md)."
            )
        return cls.from_dict(read_json(path), where=str(path))

    def _check_table(self, key: str, table: np.ndarray, width: int | None) -> np.ndarray:
        table = np.asarray(table, dtype=np.float32)
        expected = f"[{self.n_parcels}, {width or 'components'}]"
        if table.ndim != 2 or len(table) != self.n_parcels or width not in (None, table.shape[1]):
            raise UserError(
                f"atlas '{self.name}': {key} has shape {list(table.shape)}, expected {expected}: "
                "one row a parcel, in the same order."
            )
        if not np.isfinite(table).all():
            raise UserError(f"atlas '{self.name}': {key} holds NaN or infinity: give every parcel.")
        return table


@dataclass(frozen=True, kw_only=True, eq=False)
class ParcelMatch:
    """How a recording's parcels map onto an atlas."""

    order: np.ndarray
    """int64 [atlas p]: the recording's row for each atlas parcel; -1 where it has none."""
    missing: tuple[str, ...]
    """Atlas parcels that the recording lacks."""
    extra: tuple[str, ...]
    """The recording's parcels that the atlas does not know."""
    permuted: bool
    """Whether the shared parcels stand in another order than in the atlas."""

    def apply(self, bold: np.ndarray) -> np.ndarray:
        """Reorder `bold` [recording p, t] to [atlas p, t]; missing parcels become NaN rows."""
        matched = np.full((len(self.order), bold.shape[1]), np.nan, dtype=np.float32)
        present = self.order >= 0
        matched[present] = bold[self.order[present]]
        return matched


def match_parcels(names: Sequence[str], atlas: Atlas) -> ParcelMatch:
    """Match parcel `names`, in a recording's order, to `atlas`; names must agree exactly.

    Raises:
        UserError: Names are empty or repeat, or none of them is in the atlas.
    """
    _check_names(names, where="the recording")
    row = {name: i for i, name in enumerate(names)}
    order = np.array([row.get(name, -1) for name in atlas.parcels], dtype=np.int64)
    present = order[order >= 0]
    if not len(present):
        raise UserError(
            f"none of the {len(names)} parcel names ('{names[0]}', ...) is in atlas "
            f"'{atlas.name}' ('{atlas.parcels[0]}', ...): give the atlas that the recordings were "
            "made with, or rename the parcels."
        )
    known = set(atlas.parcels)
    return ParcelMatch(
        order=order,
        missing=tuple(name for name in atlas.parcels if name not in row),
        extra=tuple(name for name in names if name not in known),
        permuted=bool((np.diff(present) < 0).any()),
    )


def _check_names(names: Sequence[str], *, where: str) -> None:
    if not names:
        raise UserError(f"{where} has no parcels: expected a list of names.")
    for i, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{where}: parcel {i} has no name ({name!r}): expected text.")
    if len(set(names)) != len(names):
        seen: set[str] = set()
        twice = [name for name in names if name in seen or seen.add(name)]
        raise UserError(
            f"{where}: {len(twice)} parcel names repeat ({', '.join(map(repr, twice[:3]))}): "
            "recordings are matched by name, so names must be unique."
        )


def _round_trip(table: np.ndarray) -> list[list[float]]:
    # The shortest decimals that give the same float32 back: half the size of float64's.
    return [[float(str(value)) for value in row] for row in np.asarray(table, dtype=np.float32)]


def _table(values: Any, key: str, where: str) -> np.ndarray | None:
    if values is None:
        return None
    try:
        return np.array(values, dtype=np.float32)
    except (TypeError, ValueError):
        raise UserError(
            f"{where}: '{key}' must be a list of equally long rows of numbers, or null."
        ) from None
