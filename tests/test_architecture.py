"""The house rules that imports can show: one way down, siblings apart, heavy libraries at their one door."""

import ast
import re
from pathlib import Path

import llmq

ROOT = Path(llmq.__file__).parent
SIBLINGS = {"algorithms", "grids", "ranges", "families", "formats"}
VOCABULARY = (  # the grids of every format but GGUF's: formats read and write their fields
    "llmq.grids.int", "llmq.grids._biased", "llmq.grids._float", "llmq.grids._microscaling", "llmq.grids.fp8",
    "llmq.grids.nvfp4", "llmq.grids.mxfp4", "llmq.grids.mxfp8",
)  # fmt: skip
CLOSING = {  # a format closes OUT: it knows how OUT is written, and GGUF's own files fill a room
    "formats/_reading.py": ("llmq.checkpoint.stored",),
    "formats/_folder.py": ("llmq.checkpoint",),
    "formats/gguf.py": ("llmq.checkpoint.digest", "llmq.checkpoint.hub_metadata", "llmq.gguf"),
}
FLOORS = (  # a room, or a file of the top level, imports only from floors below its own
    "errors", "guard show launched meeting extras",
    "options conditions signals progress aside heap team jit gpu granularity overrides readers schemes qualities blend",
    "params", "minifloat", "types", "format stored",
    "registry stats", "steps histogram", "ranges grids families algorithms", "checkpoint", "model",
    "gguf onnx calibration runtime", "formats", "integrations", "loading verify",
    "evaluation recipe inspection readable talk",
    "pipeline", "export", "sharing", "distances", "report", "api", "comparing", "commands", "cli", "__main__",
)  # fmt: skip
LOW = {
    "errors", "granularity", "guard", "minifloat", "params", "types", "format", "options", "overrides", "readers",
    "registry", "stored", "jit", "gpu", "team", "launched", "meeting",
}  # fmt: skip
OF_STEPS = {"stats", "steps"}  # what algorithms are made of


def imports(file, *, late=True):
    """Yield the names that a file imports; late: also where it is called or type-checked, not only where it is read."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree) if late else tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{a.name}" for a in node.names)
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names)


def test_a_file_is_read_in_one_sitting():
    long = {str(f.relative_to(ROOT)): n for f in ROOT.rglob("*.py") if (n := f.read_text().count("\n")) > 400}
    assert not long


def test_the_folders_of_methods_do_not_import_each_other():
    seen = 0
    for folder in SIBLINGS:
        for file in (ROOT / folder).glob("*.py"):
            for name in imports(file):
                if not name.startswith("llmq."):
                    continue
                seen += 1
                room = name.split(".")[1]
                allowed = room in LOW or room == folder or (room in OF_STEPS and folder == "algorithms")
                allowed |= folder == "formats" and name.startswith(VOCABULARY)
                allowed |= name.startswith(CLOSING.get(f"{folder}/{file.name}", ()))
                assert allowed, f"{file.name} imports {name}"
    assert seen > 20


def test_the_base_imports_nothing_above_it():
    low = [f for name in (*LOW, *OF_STEPS) for f in (ROOT / f"{name}.py", *(ROOT / name).glob("*.py")) if f.exists()]
    assert len(low) > 8
    for file in low:
        above = [n for n in imports(file) if n.startswith("llmq.") and n.split(".")[1] not in LOW | OF_STEPS]
        assert not above, f"{file.name} imports {above}"


def test_the_rooms_stand_one_above_the_other():
    floor = {room: i for i, rooms in enumerate(FLOORS) for room in rooms.split()}
    files = [f for f in ROOT.rglob("*.py") if f != ROOT / "__init__.py"]
    assert {f.relative_to(ROOT).parts[0].removesuffix(".py") for f in files} == set(floor)
    for file in files:
        own = file.relative_to(ROOT).parts[0].removesuffix(".py")
        for name in imports(file):
            room = name.split(".")[1] if name.startswith("llmq.") else own
            if room in floor and room != own:
                assert floor[room] < floor[own], f"{file.relative_to(ROOT)} imports {name}, which is not below it"


def reached(files):
    """Return all files of llmq that are read where these are imported."""
    seen, new = set(), set(files)
    while new:
        seen |= new
        names = {n for file in new for n in imports(file, late=False) if n.split(".")[0] == "llmq"}
        names |= {n.rpartition(".")[0] for n in names}  # a package is read before its modules
        places = [ROOT.parent.joinpath(*n.split(".")) for n in names]
        new = {f for p in places for f in (p.with_suffix(".py"), p / "__init__.py") if f.exists()} - seen
    return seen


def test_what_verifies_shares_nothing_with_what_packs():
    """Nor does what it imports, to the end; the registry finds it rotations that a record names: they pack nothing."""
    own = set((ROOT / "verify").glob("*.py"))
    assert len(own) > 5 and len(reached(own)) > len(own) + 15
    for file in reached(own):
        shared = [n for n in imports(file) if n.startswith(("llmq.formats", "llmq.grids", "llmq.gguf.container"))]
        assert not shared, f"{file.relative_to(ROOT)}, which verify reaches, imports {shared}"


def test_the_types_of_the_domain_are_typed():
    for name in ("types", "params", "granularity"):
        said = [
            n for n in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())) if isinstance(n, ast.Name | ast.alias)
        ]
        assert len(said) > 20
        assert not [n for n in said if getattr(n, "id", getattr(n, "name", "")) in ("Any", "cast")], name


def test_no_pickle_and_no_remote_code():
    for file in ROOT.rglob("*.py"):
        text = file.read_text()
        assert "pickle" not in set(imports(file)) and "torch.load(" not in text, file
        assert "trust_remote_code=True" not in text, file


def test_the_map_of_the_code_names_every_room_and_nothing_that_is_not_there():
    tree = (ROOT.parent / "docs/code.md").read_text().split("```")[1]
    repository = room = ROOT.parent
    named = set()
    for line in tree.splitlines():
        if line[:1].strip():
            room = repository / line.split()[0]
            room = room if room.is_dir() else room.parent
        for name in re.findall(r"[\w/]+(?:\.py|\.md|/)(?!\w)", line):
            found = [p for p in (repository / name, room / name) if p.exists()]
            assert found, f"docs/code.md names {name}, which is not there"
            named.update(found)
    rooms = {file.parent for file in ROOT.glob("*/*.py")}
    assert (rooms | set(ROOT.glob("*.py"))) - named == {ROOT / "__init__.py"}
