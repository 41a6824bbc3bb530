"""Who may import whom: the table of docs/design.md, held by reading the imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "runtime": set(),
    "data": {"runtime"},
    "encoders": {"runtime", "data"},
    "genetics": {"runtime", "data"},
    "alignment": {"runtime", "data"},
    "eval": {"runtime", "data"},
    "integrations": {"runtime", "data", "encoders"},
    "cli": {"runtime", "data", "encoders", "genetics", "alignment", "eval"},
}
NEVER = {"evo2", "vortex", "mamba_ssm", "transformers", "flash_attn", "timm", "torchvision"}


def modules() -> list[Path]:
    return sorted((ROOT / "brainfusion").rglob("*.py"))


def imported(path: Path, *, at_import_time: bool = False) -> set[str]:
    """Full names of what a file imports, anywhere or only at its top level."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree)
    if at_import_time:
        inside = {
            id(node)
            for function in ast.walk(tree)
            if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
            for node in ast.walk(function)
        }
        nodes = [node for node in ast.walk(tree) if id(node) not in inside]
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports are not used here"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def layer(path: Path) -> str | None:
    parts = path.relative_to(ROOT / "brainfusion").parts
    return parts[0] if len(parts) > 1 else None


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_layer_imports_only_the_layers_below_it(path):
    own = layer(path)
    if own is None:
        return
    used = {name.split(".")[1] for name in imported(path) if name.startswith("brainfusion.")}
    allowed = MAY_IMPORT[own] | {own, "__version__"}
    assert used <= allowed, f"{path} ({own}) imports {sorted(used - allowed)}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_heavy_or_compiled_packages_are_never_imported(path):
    used = {name.split(".")[0] for name in imported(path)}
    assert not used & NEVER


@pytest.mark.parametrize(
    "path", sorted((ROOT / "brainfusion/eval").glob("*.py")), ids=lambda p: p.name
)
def test_eval_imports_no_torch_at_import_time(path):
    assert "torch" not in {name.split(".")[0] for name in imported(path, at_import_time=True)}


def test_scripts_import_only_the_command_line():
    for path in (ROOT / "scripts").glob("*.py"):
        used = {name for name in imported(path) if name.startswith("brainfusion")}
        assert used <= {"brainfusion.cli", "brainfusion.cli.run"}, path


def test_import_brainfusion_is_fast_and_imports_no_torch():
    code = (
        "import sys, time; begin = time.process_time(); import brainfusion; "
        "spent = time.process_time() - begin; "
        "heavy = {'torch', 'numpy', 'pandas', 'polars', 'sklearn', 'faiss'} & set(sys.modules); "
        "print(spent, sorted(heavy))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    spent, heavy = out.stdout.split(maxsplit=1)
    assert heavy.strip() == "[]"
    assert float(spent) < 0.1


def test_importing_eval_loads_no_torch():
    code = "import brainfusion.eval.retrieval.metrics, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def tree_of_readme() -> set[str]:
    """Paths of the README's tree, read from its indentation."""
    text = (ROOT / "README.md").read_text()
    block = text[text.index("<!-- tree -->") : text.index("<!-- /tree -->")]
    folders, paths = [], set()
    for line in block.splitlines():
        name = line.strip().split(" ")[0]
        depth = (len(line) - len(line.lstrip())) // 2
        if name.endswith("/"):
            folders[depth:] = [name]
        elif name.endswith(".py"):
            assert len(line.split()) > 1, f"{name} has no clause"
            paths.add("".join(folders[:depth]) + name)
    return paths


def test_the_readme_tree_names_each_file_with_a_clause():
    folders = ("brainfusion", "scripts", "benchmarks")
    existing = {
        str(path.relative_to(ROOT))
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if path.name not in ("__init__.py", "__main__.py")
    }
    assert tree_of_readme() == existing
