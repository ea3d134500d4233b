"""The documentation's programs run as they stand, and its links lead somewhere."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest
from ranks import run_child

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")]
)


def blocks(page: Path) -> list[str]:
    """The Python blocks of a page."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)


def test_the_page_of_the_transfer_engine_is_one_program(tmp_path: Path) -> None:
    program = tmp_path / "page.py"
    parts = blocks(ROOT / "docs/transfer-engine.md")
    assert len(parts) >= 5
    program.write_text("\n".join(parts))
    printed = run_child(str(program))
    assert "0 of 1 transfers have come" in printed
    assert "layers 0 to 1" in printed
    assert "id 5 has come" in printed


README_USE = """
    n, d = mesh.size, 4
    x = jnp.ones((2 * n, d))
    ids = jnp.arange(4 * n, dtype=jnp.int32).reshape(2 * n, 2) % E
    y = moe(x, ids, jnp.full((2 * n, 2), 0.5), jnp.stack([jnp.eye(d)] * E))
    assert (y == x).all()

with jf.Fabric(mesh) as fabric:
{primitives}
    dst = (jnp.arange(n, dtype=jnp.int32) + 1) % n
    x = jnp.arange(n * 4 * 128, dtype=jnp.float32).reshape(4 * n, 128)
    y, tok = jax.jit(jax.shard_map(
        lambda x, dst: step(x, dst[0]), mesh=mesh, in_specs=P("expert"),
        out_specs=P("expert"), check_vma=False))(x, dst)
    assert (y == jnp.roll(x, 4, axis=0)).all()
print("both are right")
"""


def test_the_first_programs_of_the_readme(tmp_path: Path) -> None:
    first, primitives, *_ = blocks(ROOT / "README.md")
    assert "def moe(" in first
    assert "jf.put(" in primitives
    program = tmp_path / "readme.py"
    rest = README_USE.format(primitives=textwrap.indent(primitives, "    "))
    program.write_text(first + rest)
    assert "both are right" in run_child(str(program))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_project(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
