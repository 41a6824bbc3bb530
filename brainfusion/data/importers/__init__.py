"""Importers turn anyone's parcellated recordings into a cohort folder."""

from brainfusion.data.importers.config import ImportConfig, ImportReport
from brainfusion.data.importers.pipeline import (
    import_array,
    import_cohort,
    import_mat,
    import_npy_folder,
    import_tables,
)

__all__ = [
    "ImportConfig",
    "ImportReport",
    "import_array",
    "import_cohort",
    "import_mat",
    "import_npy_folder",
    "import_tables",
]
