"""DNA embeddings at the size of a biobank: import, store, read; beside `.pt` files and HDF5.

First, people x genes x width with both haplotypes, from one `.npy` a gene, into a dictionary store:
seconds and peak memory of a process that does nothing else. Haplotypes are drawn as Ewens (1972)
says, with theta such that 600 of them are 97, 41 or 91 distinct ones, as at the OXT, AVP and PDYN
loci of 300 people of the 1000 Genomes Project. The files of genes are links to three, so the
source takes little room, and is read from the page cache.

Second, fewer people and one vector a person and gene: what each form takes on disk, and how long a
batch of random people takes, warm, all genes and their mean.

    python benchmarks/genetics.py            # 20,000 people x 50 genes; 3 GiB of disk
    python benchmarks/genetics.py --quick    # a smoke test, seconds
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from brainfusion.genetics import GeneticFeatures, Provenance, open_store, open_stream, write_store
from brainfusion.genetics.parts import ready_blocks
from brainfusion.genetics.store_writer import StoreWriter
from brainfusion.runtime.files import write_json
from brainfusion.runtime.memory import peak_mib

THETAS = {"OXT": 33.0, "AVP": 10.5, "PDYN": 30.0}
PROVENANCE = {
    "model": "generator",
    "checkpoint": "GENERator-v2-eukaryote-1.2b-base",
    "layer": "last",
    "pooling": "mean",
    "strands": "fwd_only",
    "sequence": "personal",
    "reference": "GRCh37",
    "indels": "none",
}
WIDTH, BATCH = 2048, 1024


def draw_haplotypes(n: int, theta: float, rng: np.random.Generator) -> np.ndarray:
    """Which haplotype each of `n` is, int64 [n]: sticks broken as GEM(theta)."""
    sticks = rng.beta(1.0, theta, size=int(60 * theta))
    shares = sticks * np.cumprod(np.concatenate([[1.0], 1.0 - sticks[:-1]]))
    return rng.choice(len(shares), size=n, p=shares / shares.sum())


def haplotype_vectors(n: int, rng: np.random.Generator) -> np.ndarray:
    """float32 [n, WIDTH]: a thousandth apart, as pooled vectors of personal sequences are."""
    common = rng.standard_normal(WIDTH)
    return (common * (1 + 1e-3 * rng.standard_normal((n, WIDTH)))).astype(np.float32)


def write_source(folder: Path, n_people: int, n_genes: int) -> dict[str, int]:
    """One .npy [n, 2, WIDTH] a gene, three of them real; distinct haplotypes of each."""
    distinct, rng = {}, np.random.default_rng(0)
    for name, theta in THETAS.items():
        numbers, known = draw_haplotypes(2 * n_people, theta, rng), {}
        path = folder / f"{name}.npy"
        out = np.lib.format.open_memmap(
            path, mode="w+", dtype=np.float32, shape=(n_people, 2, WIDTH)
        )
        distinct[name] = len(np.unique(numbers))
        known = dict(zip(np.unique(numbers), haplotype_vectors(distinct[name], rng), strict=True))
        for start in range(0, n_people, 1000):
            part = numbers.reshape(-1, 2)[start : start + 1000]
            out[start : start + 1000] = [[known[number] for number in pair] for pair in part]
        del out
    for gene in range(len(THETAS), n_genes):
        (folder / f"GENE{gene:02d}.npy").symlink_to(folder / f"{list(THETAS)[gene % 3]}.npy")
    (folder / "subjects.txt").write_text("".join(f"{i:05d}\n" for i in range(n_people)))
    write_json(folder / "provenance.json", {**PROVENANCE, "haplotypes": 2})
    return distinct


def import_source(source: Path, path: Path) -> dict[str, float]:
    """Import, in this process and nothing else."""
    begin = time.perf_counter()
    stream = open_stream("generator", source)
    with StoreWriter(
        path,
        subjects=stream.subjects,
        genes=stream.genes,
        width=stream.width,
        storage="dictionary",
        n_haplotypes=2,
    ) as writer:
        for block in ready_blocks(stream, lambda: stream):
            writer.add(block.rows, block.columns, block.vectors, block.mask)
        writer.finish(stream.provenance, stream.alarms)
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "peak_mib": peak_mib()}


def read_big(path: Path, batch: int) -> dict[str, float]:
    """Milliseconds to open, and of a batch, warm."""
    open_store(path)  # imports the reader of Parquet
    begin = time.perf_counter()
    features = open_store(path)
    opened = time.perf_counter() - begin
    rng = np.random.default_rng(1)
    batches = [rng.choice(features.n_subjects, batch, replace=False) for _ in range(5)]
    return {
        "open_ms": 1e3 * opened,
        "pooled_ms": milliseconds(features.pooled, batches),
        "rows_ms": milliseconds(features.rows, batches),
        "peak_mib": peak_mib(),
    }


def milliseconds(read: Callable[[np.ndarray], object], batches: list[np.ndarray]) -> float:
    """The median over batches, after all of them were read once."""
    for batch in batches:
        read(batch)
    seconds = []
    for batch in batches:
        begin = time.perf_counter()
        read(batch)
        seconds.append(time.perf_counter() - begin)
    return 1e3 * float(np.median(seconds))


def compare(root: Path, n_people: int, n_genes: int, batch: int) -> list[tuple[str, ...]]:
    """Rows of the second table: form, write s, MiB, ms of a batch's vectors, ms of their mean."""
    rng = np.random.default_rng(2)
    vectors = np.empty((n_people, n_genes, WIDTH), dtype=np.float32)
    for gene in range(n_genes):
        numbers = draw_haplotypes(2 * n_people, list(THETAS.values())[gene % 3], rng)
        known = haplotype_vectors(numbers.max() + 1, rng)
        vectors[:, gene] = known[numbers].reshape(n_people, 2, WIDTH).mean(axis=1)
    features = GeneticFeatures(
        subjects=tuple(f"{i:05d}" for i in range(n_people)),
        genes=tuple(f"GENE{i:02d}" for i in range(n_genes)),
        vectors=vectors,
        mask=np.ones((n_people, n_genes), dtype=bool),
        provenance=Provenance.from_dict(PROVENANCE, where="benchmark"),
    )
    batches = [rng.choice(n_people, batch, replace=False) for _ in range(5)]
    rows = []
    for name, write, opened in forms(features):
        path = root / name.replace(" ", "-")
        begin = time.perf_counter()
        write(path)
        seconds = time.perf_counter() - begin
        files = [path] if path.is_file() else list(path.iterdir())
        size = sum(file.stat().st_size for file in files) / 2**20
        read, pool = opened(path)
        times = (milliseconds(read, batches), milliseconds(pool, batches))
        rows.append((name, f"{seconds:.2f}", f"{size:.1f}", *(f"{ms:.1f}" for ms in times)))
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return rows


def forms(features: GeneticFeatures) -> list[tuple[str, Callable, Callable]]:
    """Name, a writer, and what opens a reader of rows and a reader of their mean over genes."""

    def stored(storage: str) -> tuple[str, Callable, Callable]:
        def opened(path: Path) -> tuple[Callable, Callable]:
            store = open_store(path)
            return store.rows, store.pooled

        return f"store {storage}", lambda p: write_store(p, features, storage=storage), opened

    rows = [
        stored("float32"),
        stored("centred-float16"),
        stored("dictionary"),
        ("a .pt a person", *pt_files(features)),
    ]
    try:
        import h5py
    except ImportError:
        print("h5py is not installed: HDF5 is left out (pip install h5py)")
        return rows

    def write(path: Path) -> None:
        with h5py.File(path, "w") as file:
            chunks = (1, *features.vectors.shape[1:])
            file.create_dataset("vectors", data=features.vectors, chunks=chunks)

    def opened(path: Path) -> tuple[Callable, Callable]:
        def read(batch: np.ndarray) -> np.ndarray:
            # Row by row: h5py's own selection of many rows is several times slower.
            with h5py.File(path, "r") as file:
                return np.stack([file["vectors"][row] for row in batch])  # type: ignore[index]

        return read, lambda batch: read(batch).mean(axis=1)

    return [*rows, ("HDF5", write, opened)]


def pt_files(features: GeneticFeatures) -> tuple[Callable, Callable]:
    import torch

    def write(path: Path) -> None:
        path.mkdir()
        for subject, vectors in zip(features.subjects, features.vectors, strict=True):
            torch.save({"last": torch.from_numpy(vectors.copy())}, path / f"{subject}.pt")

    def opened(path: Path) -> tuple[Callable, Callable]:
        def read(batch: np.ndarray) -> np.ndarray:
            names = (path / f"{features.subjects[i]}.pt" for i in batch)
            return np.stack([torch.load(n, weights_only=True)["last"].numpy() for n in names])

        return read, lambda batch: read(batch).mean(axis=1)

    return write, opened


def alone(*words: object) -> dict[str, float]:
    """Run a step of this file in a process of its own."""
    command = [sys.executable, __file__, *map(str, words)]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(out.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument("--people", type=int, default=20_000)
    parser.add_argument("--genes", type=int, default=50)
    parser.add_argument("--compared", type=int, default=1_500, help="people of the second table")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--folder", type=Path, help="where to write; the system's by default")
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        step, path, *rest = options.step
        if step == "source":
            done = write_source(Path(path), options.people, options.genes)
        elif step == "import":
            done = import_source(Path(path), Path(rest[0]))
        else:
            done = read_big(Path(path), int(rest[0]))
        print(json.dumps(done))
        return
    if options.quick:
        options.people, options.genes, options.compared = 400, 5, 100
    batch = min(BATCH, options.people // 2)
    gene_mib = options.people * 2 * WIDTH * 4 / 2**20
    needed = 3 * gene_mib + 3 * options.compared * options.genes * WIDTH * 4 / 2**20 + 500
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        root = Path(folder)
        if (free := shutil.disk_usage(root).free / 2**20) < needed:
            sys.exit(f"{needed:.0f} MiB of disk are needed and {free:.0f} free: see --folder.")
        (root / "source").mkdir()
        sizes = ("--people", options.people, "--genes", options.genes)
        distinct = alone(*sizes, "--step", "source", root / "source")
        print(
            f"{options.people} people x {options.genes} genes x 2 haplotypes x {WIDTH}: "
            f"{options.genes * gene_mib:.0f} MiB of float32; distinct of {2 * options.people}: "
            + ", ".join(f"{name} {n}" for name, n in distinct.items())
        )
        done = alone("--step", "import", root / "source", root / "store")
        size = sum(file.stat().st_size for file in (root / "store").iterdir()) / 2**20
        print(
            f"import to a dictionary: {done['seconds']:.0f} s, peak {done['peak_mib']:.0f} MiB, "
            f"{size:.1f} MiB on disk"
        )
        read = alone("--step", "read", root / "store", batch)
        print(
            f"open {read['open_ms']:.1f} ms; {batch} people: pooled [{batch}, {WIDTH}] "
            f"{read['pooled_ms']:.1f} ms, all genes {read['rows_ms']:.0f} ms; "
            f"peak {read['peak_mib']:.0f} MiB"
        )
        shutil.rmtree(root / "store")
        shutil.rmtree(root / "source")
        batch = min(256, options.compared // 2)
        print(
            f"\n{options.compared} people x {options.genes} genes x {WIDTH}, haplotypes averaged "
            f"({options.compared * options.genes * WIDTH * 4 / 2**20:.0f} MiB); batches of {batch}"
        )
        print(f"{'form':<24} {'write s':>8} {'MiB':>8} {'rows ms':>9} {'pooled ms':>10}")
        for name, seconds, size, rows, pooled in compare(
            root, options.compared, options.genes, batch
        ):
            print(f"{name:<24} {seconds:>8} {size:>8} {rows:>9} {pooled:>10}", flush=True)


class _Raw(argparse.RawDescriptionHelpFormatter):
    pass


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
