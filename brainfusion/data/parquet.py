"""Parquet tables; one that cannot be read is an error that names it."""

from pathlib import Path

import polars as pl

from brainfusion.runtime.errors import UserError


def read_table(path: Path, *, absent: str) -> pl.DataFrame:
    """Read a Parquet file.

    Args:
        path: The file.
        absent: What to say after "PATH does not exist: ".

    Raises:
        UserError: It is absent or broken.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist: {absent}")
    try:
        return pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(
            f"{path} is not a readable Parquet file ({error}): make it again."
        ) from error
